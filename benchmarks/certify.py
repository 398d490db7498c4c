"""How long certificates take on one GPU, and what they say, with random weights of a record's size.

Reads:  records/<record>.yaml
Prints: a line for each evaluator of each record, and for streaming: targets of the part of the stream that is tried,
        updates in it, tokens decoded, the verdict with the conditions that fail, seconds and peak memory. Behind the
        table, what each of them found. A certificate may take 180 s. Evaluators that were tried before with the same
        network and settings are left out.
Method: the experiments of the stage certify, as the stage runs them, on random tokens in documents as long as the
        challenge's 50,000 (benchmarks/document_lengths.py), in whole rows. There is no evaluation to account for: the
        verdict is that of the other conditions. What a decoder must be told is printed in bits, because accounting
        calls a score that leaves them out no code length.
Usage:  python -m benchmarks.certify                              all records
        python -m benchmarks.certify r1958-lora-ttt --only lora_ttt
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.document_lengths import CHALLENGE_DOCUMENTS, document_stream, document_targets
from benchmarks.evaluate import STREAMING, random_network
from fairway.certification.accounting import legal, places_bits
from fairway.certification.experiments import Certified, certify
from fairway.chosen_record import record_names
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.evaluation.registry import make_evaluator
from fairway.model.gpt import GPT
from fairway.params import Params, load_params
from fairway.runtime.distributed import make_deterministic, start_world
from fairway.tokens.tokenizer import BOS

LIMIT_S = 180


@dataclass(frozen=True)
class Line:
    """A certificate: of which record's evaluator, what it says, and what it took."""

    record: str
    evaluator: str
    certified: Certified
    seconds: float
    gib: float
    # What a decoder must be told about the whole stream.
    told_bits: float

    def row(self) -> str:
        """The line of the table."""
        decoder = self.certified.findings["decoder"].evidence
        tried = self.certified.findings["single_pass"].evidence["targets"]
        counts = f"{tried:,} | {decoder['updates']} | {decoder['decoded']:,}"
        cost = f"{self.seconds:.0f}{'' if self.seconds <= LIMIT_S else ' FAIL'} | {self.gib:.1f}"
        return f"| {self.record} | {self.evaluator} | {counts} | {self.verdict()} | {cost} |"

    def verdict(self) -> str:
        """In a few words."""
        findings = self.certified.findings
        known = {True: "all pass", False: "fail: ", "unproven": "UNPROVEN: "}[legal(findings.values())]
        failing = [name.replace("_", " ") for name, finding in findings.items() if finding.verdict != "pass"]
        told = f"; {self.told_bits:,.0f} bits must be told" if self.certified.starts_told else ""
        return known + ", ".join(failing) + told

    def sentences(self) -> str:
        """What each condition found."""
        findings = self.certified.findings.items()
        return "\n".join([f"{self.record} {self.evaluator}", *(f"  {name}: {found.why}" for name, found in findings)])


def main() -> None:
    """Certify what every record named has, and print a line each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = record_names(Path("records"))
    arguments.add_argument("records", nargs="*", default=every, help="names of files in records/; all if not given")
    arguments.add_argument("--only", nargs="+", help="evaluators; all of a record's if not given")
    chosen = arguments.parse_args()
    make_deterministic()
    torch.set_num_threads(1)
    device = start_world().device
    if device.type == "cuda":
        torch.compiler.set_stance("force_eager")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    print("| record | evaluator | targets tried | updates | tokens decoded | verdict | s | GiB |")
    print("|---|---|---:|---:|---:|---|---:|---:|", flush=True)
    records = {record: load_params(Path(f"records/{record}.yaml")) for record in chosen.records}
    found = []
    for line in certificates(records, chosen.only, document_targets(CHALLENGE_DOCUMENTS), device):
        print(line.row(), flush=True)
        found.append(line.sentences())
    print("\n".join(found))


def certificates(
    records: dict[str, Params], only: list[str] | None, lengths: list[int], device: torch.device
) -> Iterator[Line]:
    """A line for every evaluator that differs from all before, on documents with so many targets each."""
    done = set()
    for record, params in records.items():
        evaluators = {name: params.evaluator_settings(name) for name in params.evaluators} | {"streaming": STREAMING}
        stream = document_stream(lengths, vocab_size=params.model.vocab_size, seed=1)
        tokens_N1 = stream[: (len(stream) - 1) // params.model.seq_len * params.model.seq_len + 1].to(device)
        model = random_network(params.model).to_device(device)
        for name, settings in evaluators.items():
            key = json.dumps([params.model.model_dump(), name, settings.model_dump()], default=str)
            if (only is None or name in only) and key not in done:
                done.add(key)
                yield _line(record, name, settings, params, model, tokens_N1)


def _line(record: str, name: str, settings: EvaluatorSettings, params: Params, model: GPT, tokens_N1: Tensor) -> Line:
    on_gpu = tokens_N1.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started_at = time.perf_counter()
    certified = certify(
        lambda: make_evaluator(name, settings, model=model.config, processes=1),
        model,
        lambda: copy.deepcopy(model),
        tokens_N1,
        params.certify,
        lambda _: None,
    )
    seconds = time.perf_counter() - started_at
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    told_bits = places_bits(len(tokens_N1) - 1, int((tokens_N1[1:] == BOS).sum()))
    return Line(record, name, certified, seconds, gib, told_bits)


if __name__ == "__main__":
    main()
