"""How long one optimizer step of a record takes on this GPU.

Reads:  records/<record>.yaml (model and train sections)
Prints: milliseconds per step (median), tokens/s, share of the chip's own bfloat16 GEMM rate, peak memory, and seconds
        from the start of the process to the end of the first step, everything that is compiled on the way included.
Method: fairway/step_time.py
Usage:  python -m benchmarks.train_step r1958 --steps 10 --looped
        torchrun --standalone --nproc-per-node 2 -m benchmarks.train_step r1150      (two GPUs share the micro-batches)
"""

import argparse
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor

from fairway.model.backends import attention_backend
from fairway.params import load_params
from fairway.runtime.distributed import start_world
from fairway.step_time import Step, timed
from fairway.tokens.loader import Batch


def main() -> None:
    """Time a record's step and print one line a figure."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("record", help="name of a file in records/")
    arguments.add_argument("--steps", type=int, default=10, help="timed steps, after the first")
    arguments.add_argument("--looped", action="store_true", help="with depth recurrence on")
    chosen = arguments.parse_args()
    params = load_params(f"records/{chosen.record}.yaml")
    with start_world() as world:
        step = Step(params.model, params.train, world, looped=chosen.looped)
        step()
        first_s = process_age_s()
        times_ms = [1000 * timed(step) for _ in range(chosen.steps)]
        if world.rank == 0:
            report(chosen.record, step, times_ms, first_s)


def flop(step: Step) -> float:
    """Multiplications and additions of this GPU's matrix products and causal attention, forward and backward."""
    config = step.network.config
    layers = sum(map(len, config.layer_order(step.looped)))
    shapes = {
        name: p.numel() for name, p in step.network.named_parameters() if name.startswith("layer0.") and p.ndim == 2
    }
    matrices = sum(size for name, size in shapes.items() if ".attn." in name or ".mlp." in name)
    products = 6 * (step.tokens // step.world.size) * (layers * matrices + config.vocab_size * config.width)
    return products + 6 * layers * config.width * sum(map(squared_lengths, step.batches))


def squared_lengths(batch: Batch) -> int:
    """Sum of the squared lengths of what attends to itself: rows, or segments."""
    if batch.segments is None:
        return batch.inputs.size(0) * batch.inputs.size(1) ** 2
    return int(batch.segments.diff().long().square().sum())


def gemm_rate(device: torch.device) -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product in bfloat16, random numbers: the best of ten."""
    x: Tensor = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / min(timed(lambda: x @ x) for _ in range(10))


def process_age_s() -> float:
    """Seconds since the kernel started this process (Linux)."""
    started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - started_ticks / os.sysconf("SC_CLK_TCK")


def report(record: str, step: Step, times_ms: list[float], first_s: float) -> None:
    """Print the figures."""
    median_ms = statistics.median(times_ms)
    rate = flop(step) / median_ms * 1e3
    batch, config = step.batches[0], step.network.config
    backend = attention_backend(
        step.world.device,
        step.network.compute_dtype,
        config.head_dim,
        length=batch.inputs.size(1),
        packed=batch.segments is not None,
    )
    print(f"{record}{' looped' if step.looped and config.loop else ''}, attention by {backend}")
    print(f"  {median_ms:.1f} ms per step of {step.tokens} tokens ({min(times_ms):.1f} to {max(times_ms):.1f})")
    print(f"  {step.tokens / median_ms * 1e3 / 1e6:.3f} million tokens/s")
    print(f"  {rate / 1e12:.0f} TFLOP/s a GPU, {100 * rate / gemm_rate(step.world.device):.0f} % of a large GEMM")
    print(f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak memory")
    print(f"  {first_s:.1f} s from process start to the end of the first step")


if __name__ == "__main__":
    main()
