"""The trial of what ships: alone beside model.bin, train_gpt.py must score a short stream as the repository does.

The stream is the beginning of the validation stream, long enough for the shipped evaluator to learn something on the
way (short_stream). The trial leaves out how the program makes a model.bin if there is none, the phases of lora_ttt,
which take hundreds of documents, and, on a CPU with a network as large as the records', learning between chunks.
"""

import os
import re
import shutil
import subprocess
import sys
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from fairway.codec.artifact import load_artifact
from fairway.evaluation.collect import collect, measure
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.registry import make_evaluator
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone, make_deterministic
from fairway.runtime.errors import UserError
from fairway.tokens.shards import sidecar_paths, write_shard
from fairway.tokens.validation import Validation, load_validation

# By how much the figures may differ. Both come from the same computation on the same device, printed to eight digits.
TOLERANCE = 1e-6
UNITS = {"val_loss": "nats per token", "val_bpb": "bits per byte"}
# The variables that the program takes its seed and its files from.
VARIABLES = ("SEED", "DATA_PATH", "TOKENIZER_PATH")
# The longest stream in tokens, and the most work for a CPU in weights times tokens; but one row is always tried.
MOST_TOKENS = 65_536
MOST_WORK_ON_CPU = 10**10


@dataclass(frozen=True)
class ShippedRun:
    """The outcome: the number of targets, and the repository's figures for them, which the program gave as well."""

    targets: int
    figures: dict[str, float]


def check_shipped_run(
    program: bytes, model: bytes, name: str, settings: EvaluatorSettings, tokens: Path, device: torch.device
) -> ShippedRun:
    """Score the beginning of the stream in the folder `tokens` with the repository's code and with the program.

    `program` and `model` are the bytes of train_gpt.py and model.bin. The repository's code runs on `device`; the
    program runs in a process of its own, in a folder with nothing else, and chooses its device itself. Raises UserError
    naming the evaluator and both figures if they differ, or if the program ends without any.
    """
    make_deterministic()
    with TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "train_gpt.py").write_bytes(program)
        (folder / "model.bin").write_bytes(model)
        network = load_artifact(folder / "model.bin", device)
        evaluator = make_evaluator(name, settings, model=network.config, processes=1)
        validation = _beginning(tokens, network, evaluator)
        _write_stream(folder, validation, tokens)
        # Both at the same time: most of what either of them takes is to start, and on a GPU to build its kernels.
        with ThreadPoolExecutor(1) as beside:
            trial = beside.submit(_shipped_figures, folder)
            own = _own_figures(evaluator, network, validation)
            shipped, fault = trial.result()
    for key, unit in UNITS.items():
        if not abs(shipped[key] - own[key]) <= TOLERANCE:
            raise UserError(
                f"train_gpt.py: {name} scores {shipped[key]:.8f} {unit}, expected {own[key]:.8f} as the repository "
                f"scores the first {len(validation.bytes)} targets of {tokens}{fault}"
            )
    return ShippedRun(len(validation.bytes), own)


def short_stream(evaluator: Evaluator, network: GPT, tokens_N1: Tensor) -> int:
    """How many targets at the beginning of a stream (N+1,) the trial scores: whole rows, as the stream is read.

    It is the shortest beginning of at least two rows in which the evaluator has more than one chunk, since it learns
    between chunks. If that is too long for a trial, it is the shortest beginning that the evaluator accepts.
    """
    seq_len, world = network.config.seq_len, alone(tokens_N1.device)
    most, last = MOST_TOKENS // seq_len, (len(tokens_N1) - 1) // seq_len
    if not tokens_N1.is_cuda:
        most = min(most, MOST_WORK_ON_CPU // sum(weight.numel() for weight in network.parameters()) // seq_len)

    def chunks(rows: int) -> int:
        try:
            return evaluator.begin(network, tokens_N1[: rows * seq_len + 1], world).chunks
        except UserError:
            return 0

    tried = range(2, min(most, last) + 1)
    learns = bisect_left(tried, True, key=lambda rows: chunks(rows) > 1)
    if learns < len(tried):
        return tried[learns] * seq_len
    rows = 1
    while rows < last and not chunks(rows):
        rows *= 2
    return min(rows, last) * seq_len


def _beginning(tokens: Path, network: GPT, evaluator: Evaluator) -> Validation:
    config = network.config
    whole = load_validation(tokens, seq_len=config.seq_len, vocab_size=config.vocab_size)
    device = next(network.parameters()).device
    targets = short_stream(evaluator, network, whole.tokens.to(device))
    return Validation(whole.tokens[: targets + 1].to(device), whole.bytes[:targets])


def _write_stream(folder: Path, validation: Validation, tokens: Path) -> None:
    """Write the stream as a folder of tokens: a shard, and the sidecar or tokenizer that its bytes are known from."""
    write_shard(folder / "val_000000.bin", validation.tokens.cpu().numpy().astype(np.uint16))
    if sidecar_paths(tokens):
        # The first token is no target, so it has no bytes.
        write_shard(folder / "val_bytes_000000.bin", np.insert(validation.bytes.numpy(), 0, 0).astype(np.uint16))
    else:
        shutil.copyfile(tokens / "tokenizer.model", folder / "tokenizer.model")


def _own_figures(evaluator: Evaluator, network: GPT, validation: Validation) -> dict[str, float]:
    world = alone(validation.tokens.device)
    evaluation = evaluator.begin(network, validation.tokens, world)
    scores = collect(evaluation, validation.tokens, world, scored=lambda positions, nats: None)
    return {key: figure for key, figure in measure(scores, validation.bytes).items() if key in UNITS}


def _shipped_figures(folder: Path) -> tuple[dict[str, float], str]:
    """The figures that the program in the folder prints, NaN for those it does not, and its complaint if it fails."""
    command = [sys.executable, "-I", "train_gpt.py"]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    line = re.search(r"^final_\w+_exact .*$", done.stdout, flags=re.MULTILINE)
    printed = dict(re.findall(r"(val_\w+):(\d+\.\d+)", line[0] if line else ""))
    complaint = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return {key: float(printed.get(key, nan)) for key in UNITS}, "".join(f" ({line})" for line in complaint)
