"""How long a record's evaluations take on one GPU, with random weights of its size.

Reads:  records/<record>.yaml
Prints: per record: each of its evaluators as its params set them, one epoch of its adaptation if it has one, and
        streaming: seconds warm for 1,048,576 targets, and cold (what a first run of a process takes longer, measured on
        an eighth of the targets, added), peak memory, and what the validation stream of 62,021,632 tokens would take
        eight such GPUs, compilation and all epochs included. Then whether what the record's score needs (adaptation to
        the validation stream and the evaluator that its program runs) fits into the track's 600 s. Ideal division by
        eight is an estimate: it leaves out the exchange of gradients and the smaller batches of a GPU. lora_ttt is
        timed on documents of the challenge's lengths instead, and projected batch by batch to its 50,000 documents on
        a GPU for each lane; where its seconds go is printed behind the table (benchmarks/phased_ttt.py).
Method: the stage's own evaluators on random tokens, in deterministic mode. Weights are random too, none of them zero.
Usage:  python -m benchmarks.evaluate r1150 r1488 --only sliding slot
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from benchmarks.phased_ttt import time_phased
from fairway.adaptation.row_training import AdaptSettings, adapt
from fairway.evaluation.collect import collect
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.lora_ttt import LoraTttSettings
from fairway.evaluation.registry import make_evaluator
from fairway.evaluation.streaming import StreamingEvaluator, StreamingSettings
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.params import Params, load_params
from fairway.runtime.distributed import World, make_deterministic, start_world
from fairway.tokens.tokenizer import BOS

STREAM_TOKENS, GPUS, LIMIT_S = 62_021_632, 8, 600
STREAMING = StreamingSettings(block_tokens=8192, lanes=8, within_documents=False)
# Seconds for 1,048,576 targets on one H200 that we hold ourselves to.
TARGET_S = {
    ("r1150", "sliding"): 5.5,
    ("r1150", "ttt"): 15.0,
    ("r1150", "streaming"): 1.0,
    ("r1172", "sliding"): 5.5,
    ("r1172", "slot"): 10.0,
    ("r1488", "slot"): 8.0,
    ("r1488", "adapt"): 1.2,
}


def main() -> None:
    """Time what every record named has, and print one line each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("records", nargs="+", help="names of files in records/")
    arguments.add_argument(
        "--only", nargs="+", help="evaluators, or adapt, or streaming; all of a record's if not given"
    )
    arguments.add_argument("--targets", type=int, default=1_048_576)
    chosen = arguments.parse_args()
    make_deterministic()
    with start_world() as world:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{chosen.targets} targets, {name}, torch {torch.__version__}")
        print(f"| record | evaluation | cold s | warm s | target s | GiB | {STREAM_TOKENS} tokens, {GPUS} GPUs, s |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
        behind = [line for record in chosen.records for line in _record(record, chosen.only, chosen.targets, world)]
    print("\n".join(behind))


def random_network(config: ModelConfig) -> GPT:
    """A network a little off its start, where much is zero: that takes 3 % less time, by taking less power."""
    model = GPT(config)
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


class Line(NamedTuple):
    """Seconds for the whole stream on all GPUs, and what there is to say of them behind the table."""

    whole_s: float
    note: str = ""


def _record(record: str, only: list[str] | None, targets: int, world: World) -> list[str]:
    """Prints a record's lines of the table; what is printed behind it, whether the record keeps the limit last."""
    settings = load_params(Path(f"records/{record}.yaml"))
    model = random_network(settings.model).to_device(world.device)
    wanted = [*settings.evaluators, *(["adapt"] if settings.adapt.epochs else []), "streaming"]
    lines = {
        name: _line(record, name, settings, model, targets, world) for name in wanted if only is None or name in only
    }
    notes = [f"{record}: {line.note}" for line in lines.values() if line.note]
    in_evaluation = settings.adapt.epochs and settings.adapt.split == "validation"
    counted = [*(["adapt"] if in_evaluation else []), settings.compress.evaluator]
    if not set(counted) <= set(lines):
        return [*notes, f"{record}: not timed: {' + '.join(counted)}"]
    total_s = sum(lines[name].whole_s for name in counted)
    verdict = "pass" if total_s <= LIMIT_S else "FAIL"
    return [*notes, f"{record}: {' + '.join(counted)}: {total_s:.0f} of {LIMIT_S} s: {verdict}"]


def _line(record: str, name: str, settings: Params, model: GPT, targets: int, world: World) -> Line:
    """Prints a line of the table."""
    torch.compiler.reset()
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timing = _phased if name == "lora_ttt" else _scaled
    label, cold_s, warm_s, line = timing(name, settings, model, targets, world)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    target = f"{TARGET_S[record, name]:.1f}" if (record, name) in TARGET_S else "–"
    row = (record, label, f"{cold_s:.2f}", f"{warm_s:.2f}", target, f"{memory:.1f}", f"{line.whole_s:.0f}")
    print(f"| {' | '.join(row)} |", flush=True)
    return line


# What a line says the evaluation is, seconds cold, seconds warm, and the rest of it.
Timing = tuple[str, float, float, Line]


def _scaled(name: str, settings: Params, model: GPT, targets: int, world: World) -> Timing:
    """An evaluation whose time is in proportion to the number of targets."""
    tokens_N1 = random_stream(settings.model.vocab_size, targets).to(world.device)
    epochs, label, work = _work(name, settings, model, world)
    # Steps of adaptation are of another shape on a shorter stream.
    short = tokens_N1 if name == "adapt" else tokens_N1[: targets // 8 + 1]
    with fresh_cache():
        first_s, second_s = timed(work, short), timed(work, short)
        warm_s = second_s if name == "adapt" else timed(work, tokens_N1)
    extra_s = first_s - second_s
    return label, warm_s + extra_s, warm_s, Line(extra_s + epochs * warm_s * STREAM_TOKENS / targets / GPUS)


def _phased(name: str, settings: Params, model: GPT, targets: int, world: World) -> Timing:
    """Phased LoRA TTT."""
    section = settings.evaluator_settings(name)
    assert isinstance(section, LoraTttSettings)
    times = time_phased(model, section, world, targets=targets)
    label = f"{name}, {times.targets} targets"
    return (
        label,
        times.warm_s + times.cold_s,
        times.warm_s,
        Line(times.cold_s + sum(times.challenge_s), times.summary()),
    )


# From a stream (N+1,) to a mean loss.
Work = Callable[[Tensor], float]


def _work(name: str, settings: Params, model: GPT, world: World) -> tuple[int, str, Work]:
    """How often a score needs it, what to call it, and the thing itself."""
    if name == "adapt":
        epochs = settings.adapt.epochs
        one = settings.adapt.model_copy(update={"epochs": 1})
        return epochs, f"adapt, one of {epochs} epochs", adapt_once(model, one)
    if name == "streaming":
        return 1, name, evaluate_once(StreamingEvaluator(STREAMING), model, world)
    section = settings.evaluator_settings(name)
    stride = getattr(section, "stride", None)
    label = name if stride is None else f"{name}, stride {stride}"
    evaluator = make_evaluator(name, section, model=settings.model, processes=world.size)
    return 1, label, evaluate_once(evaluator, model, world)


def random_stream(vocab_size: int, targets: int) -> Tensor:
    """Tokens (N+1,) int64, a document's start every 1024."""
    tokens_N1 = torch.randint(BOS + 1, vocab_size, (targets + 1,), generator=torch.Generator().manual_seed(1))
    tokens_N1[::1024] = BOS
    return tokens_N1


def evaluate_once(evaluator: Evaluator, model: GPT, world: World) -> Work:
    """One evaluation from its beginning to its mean loss."""

    def work(tokens_N1: Tensor) -> float:
        evaluation = evaluator.begin(model, tokens_N1, world)
        return float(collect(evaluation, tokens_N1, world, scored=lambda positions, nats: None).nats_N.mean())

    return work


def adapt_once(model: GPT, settings: AdaptSettings) -> Work:
    """One epoch before quantization, on a copy, of whole rows."""
    seq_len = model.config.seq_len
    return lambda tokens_N1: adapt(
        copy.deepcopy(model), tokens_N1.unfold(0, seq_len + 1, seq_len), settings, lambda rows: None
    )[0]


def timed(work: Work, tokens_N1: Tensor) -> float:
    """Seconds; the result is a number on the host, so the device is done."""
    started_at = time.perf_counter()
    work(tokens_N1)
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
