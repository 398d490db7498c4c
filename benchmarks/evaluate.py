"""How long evaluations take on one GPU, with random weights of a record's size.

Reads:  records/<record>.yaml (model section; of adapt the number of epochs)
Prints: per record and evaluation: seconds cold (first run of a process, nothing compiled before) and warm (second run)
        for 1,048,576 targets, peak memory, and what the whole validation stream of 62,021,632 tokens would take eight
        such GPUs, compilation included, against the track's 600 s. Ideal division by eight is an estimate: it leaves
        out the exchange of gradients and the smaller batches of a GPU.
Method: the stage's own evaluators on random tokens, in deterministic mode; training is of the validation stream's size
        whatever its text, so random weights and tokens take the same time as real ones.
Usage:  python -m benchmarks.evaluate r1150 r1172 --only sliding slot8
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from model.embedding import BOS
from model.gpt import GPT
from stages import params
from stages.adapt.adapt import adapt
from stages.determinism import make_deterministic
from stages.distributed import World, start_world
from stages.evaluate.collect import collect
from stages.evaluate.evaluator import Evaluator
from stages.evaluate.sliding import SlidingEvaluator
from stages.evaluate.slot import SlotEvaluator
from stages.evaluate.streaming import StreamingEvaluator
from stages.evaluate.ttt import TttEvaluator

STREAM_TOKENS, GPUS, LIMIT_S = 62_021_632, 8, 600

SLOT24: dict[str, Any] = {"steps": 24, "lr": 0.012, "lr_end": 1e-3, "fitted_on": "scored", "bias": True}
TTT: dict[str, Any] = {"chunk_tokens": 32_768, "epochs": 3, "lr": 2e-3, "momentum": 0.9, "grad_clip": 1.0}
EVALUATORS: dict[str, Evaluator] = {
    "sliding": SlidingEvaluator(params.Sliding(stride=64, batch_windows=32)),
    "slot24": SlotEvaluator(params.Slot(stride=96, batch_windows=32, **SLOT24)),
    "slot8": SlotEvaluator(params.Slot(stride=64, batch_windows=32, steps=8, lr=5e-3)),
    "ttt_slot5": TttEvaluator(
        params.Ttt(
            stride=64, batch_windows=32, batch_rows=32, freeze_blocks=0, slot=params.SlotFit(steps=5, lr=3e-3), **TTT
        )
    ),
    "streaming": StreamingEvaluator(params.Streaming(chunk_tokens=512, block_tokens=8192, lanes=8)),
}
ADAPT = params.Adapt(
    epochs=1, split="validation", lr=4.5e-4, lr_floor=0.1, batch_rows=32, grad_clip=1.0, freeze_blocks=1
)
# Seconds for 1,048,576 targets on one H200 that we hold ourselves to, at the size of r1150.
TARGET_S = {"sliding": 5.5, "slot24": 8.0, "slot8": 10.0, "ttt_slot5": 15.0, "adapt": 1.2, "streaming": 1.0}


def main() -> None:
    """Time every evaluation of every record named, and print one line each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("records", nargs="+", help="names of files in records/")
    arguments.add_argument("--only", nargs="+", choices=TARGET_S, default=list(TARGET_S), help="evaluations to time")
    arguments.add_argument("--targets", type=int, default=1_048_576)
    chosen = arguments.parse_args()
    make_deterministic()
    with start_world() as world:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{chosen.targets} targets, {name}, torch {torch.__version__}")
        print("| record | evaluation | cold s | warm s | target s | GiB | 62 M tokens, 8 GPUs, s | share of 600 s |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for record in chosen.records:
            settings = params.load_params(Path(f"records/{record}.yaml"))
            for evaluation in chosen.only:
                print(row(record, evaluation, settings, chosen.targets, world), flush=True)


def row(record: str, evaluation: str, settings: params.Params, targets: int, world: World) -> str:
    """A line of the table."""
    model = GPT(settings.model)
    model.init_weights(1)
    model.to_device(world.device)
    tokens_N1 = random_stream(settings.model.vocab_size, targets).to(world.device)
    work = (
        evaluate_once(evaluation, model, tokens_N1, world) if evaluation in EVALUATORS else adapt_once(model, tokens_N1)
    )
    torch.compiler.reset()
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with fresh_cache():
        cold_s, warm_s = timed(work), timed(work)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    epochs = max(settings.adapt.epochs, 1) if evaluation == "adapt" else 1
    whole_s = cold_s - warm_s + epochs * warm_s * STREAM_TOKENS / targets / GPUS
    target = f"{TARGET_S[evaluation]:.1f}"
    label = f"{evaluation}, {epochs} epochs" if epochs > 1 else evaluation
    return (
        f"| {record} | {label} | {cold_s:.2f} | {warm_s:.2f} | {target} | {memory:.1f} "
        f"| {whole_s:.0f} | {100 * whole_s / LIMIT_S:.0f} % |"
    )


def random_stream(vocab_size: int, targets: int) -> Tensor:
    """Tokens (N+1,) int64, a document's start every 1024."""
    tokens_N1 = torch.randint(BOS + 1, vocab_size, (targets + 1,), generator=torch.Generator().manual_seed(1))
    tokens_N1[::1024] = BOS
    return tokens_N1


def evaluate_once(name: str, model: GPT, tokens_N1: Tensor, world: World) -> Callable[[], float]:
    """One evaluation from its beginning to its mean loss."""

    def work() -> float:
        evaluation = EVALUATORS[name].begin(model, tokens_N1, world)
        return float(collect(evaluation, tokens_N1, world, scored=lambda positions, nats: None).nats_N.mean())

    return work


def adapt_once(model: GPT, tokens_N1: Tensor) -> Callable[[], float]:
    """One epoch before quantization, on a copy."""
    seq_len = model.config.seq_len
    rows_RT1 = tokens_N1.unfold(0, seq_len + 1, seq_len)
    return lambda: adapt(copy.deepcopy(model), rows_RT1, ADAPT, lambda rows: None)[0]


def timed(work: Callable[[], float]) -> float:
    """Seconds; the result is a number on the host, so the device is done."""
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
