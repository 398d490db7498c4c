"""How long one optimizer step of a record takes on this GPU.

Reads:  records/<record>.yaml (model and train sections)
Prints: milliseconds per step (median), tokens/s, share of the chip's own bfloat16 GEMM rate, peak memory, and seconds
        from the start of the process to the end of the first step, everything that is compiled on the way included.
Method: the train stage's network, gradients, clipping, optimizer and average on random tokens; documents, where the
        record packs them, have log-normal lengths with a median of 500 tokens and a mean of 1000.
Usage:  python -m benchmarks.train_step r1958 --steps 10 --looped
        torchrun --standalone --nproc-per-node 2 -m benchmarks.train_step r1150      (two GPUs share the micro-batches)
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairway.model.backends import attention_backend, compiled
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT, param_groups
from fairway.params import load_params
from fairway.runtime.distributed import World, start_world
from fairway.tokens.data_orders import BOS, document_bounds
from fairway.tokens.loader import Batch
from fairway.training.averages import Ema
from fairway.training.optimizer import Optimizer
from fairway.training.schedule import TrainSettings


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


class Step:
    """One optimizer step on the same micro-batches each time."""

    def __init__(self, model: ModelConfig, train: TrainSettings, world: World, *, looped: bool) -> None:
        self.world, self.looped, self.tokens = world, looped, train.batch_tokens
        self.network = GPT(model)
        self.network.init_weights(1)
        self.network.to_device(world.device)
        self.forward = compiled(self.network)
        groups = param_groups(self.network, side_matrices=train.muon.side_matrices)
        self.optimizer = Optimizer(groups, train, world)
        self.ema = Ema(dict(self.network.named_parameters()), 0.997)
        count = train.batch_tokens // train.micro_batch_tokens
        self.batches = [
            self._batch(seed, train.micro_batch_tokens, packed=train.loader.kind == "packed")
            for seed in range(world.rank, count, world.size)
        ]

    def _batch(self, seed: int, tokens: int, *, packed: bool) -> Batch:
        random = np.random.default_rng(seed)
        config = self.network.config
        row = random.integers(BOS + 1, config.vocab_size, tokens + 1)
        segments = None
        if packed:
            starts = random.lognormal(np.log(500), 1.18, tokens).astype(int).cumsum()
            row[[0, *starts[starts < tokens]]] = BOS
            segments = torch.from_numpy(document_bounds(row[:-1], cut=config.seq_len, bucket=64)).to(self.world.device)
            # Its length is not worth a graph of its own.
            torch._dynamo.mark_dynamic(segments, 0)
        inputs, targets = (
            torch.from_numpy(x).view(-1, tokens if packed else config.seq_len) for x in (row[:-1], row[1:])
        )
        return Batch(inputs.to(self.world.device), targets.to(self.world.device), segments)

    def __call__(self) -> float:
        """This GPU's mean loss in the step."""
        self.optimizer.gradients.clear()
        losses = []
        for inputs, targets, segments in self.batches:
            loss = self.forward(inputs, targets, segments=segments, looped=self.looped)
            loss.backward()
            self.optimizer.add_gradients()
            losses.append(loss.detach())
        self.optimizer.step(lr_scale=0.01, momentum=0.9)
        self.ema.update()
        return float(torch.stack(losses).mean())

    def flop(self) -> float:
        """Multiplications and additions of this GPU's matrix products and causal attention, forward and backward."""
        config = self.network.config
        layers = sum(map(len, config.layer_order(self.looped)))
        shapes = {
            name: p.numel() for name, p in self.network.named_parameters() if name.startswith("layer0.") and p.ndim == 2
        }
        matrices = sum(size for name, size in shapes.items() if ".attn." in name or ".mlp." in name)
        products = 6 * (self.tokens // self.world.size) * (layers * matrices + config.vocab_size * config.width)
        return products + 6 * layers * config.width * sum(map(squared_lengths, self.batches))


def squared_lengths(batch: Batch) -> int:
    """Sum of the squared lengths of what attends to itself: rows, or segments."""
    if batch.segments is None:
        return batch.inputs.size(0) * batch.inputs.size(1) ** 2
    return int(batch.segments.diff().long().square().sum())


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes, the GPU's work included."""
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started_at


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
    rate = step.flop() / median_ms * 1e3
    batch, config = step.batches[0], step.network.config
    backend = attention_backend(
        step.world.device, step.network.compute_dtype, length=batch.inputs.size(1), packed=batch.segments is not None
    )
    print(f"{record}{' looped' if step.looped and config.loop else ''}, attention by {backend}")
    print(f"  {median_ms:.1f} ms per step of {step.tokens} tokens ({min(times_ms):.1f} to {max(times_ms):.1f})")
    print(f"  {step.tokens / median_ms * 1e3 / 1e6:.3f} million tokens/s")
    print(f"  {rate / 1e12:.0f} TFLOP/s a GPU, {100 * rate / gemm_rate(step.world.device):.0f} % of a large GEMM")
    print(f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak memory")
    print(f"  {first_s:.1f} s from process start to the end of the first step")


if __name__ == "__main__":
    main()
