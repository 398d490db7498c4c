"""One optimizer step of a record on this machine's GPUs: what benchmarks time, and what tells a slow machine in time.

The train stage's network, gradients, clipping, optimizer and average, on random tokens. Documents, where the record
packs them, have log-normal lengths with a median of 500 tokens and a mean of 1000.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from fairway.model.backends import compiled
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT, param_groups
from fairway.params import load_params
from fairway.runtime.distributed import World, alone
from fairway.tokens.data_orders import BOS, document_bounds
from fairway.tokens.loader import Batch
from fairway.training.averages import Ema
from fairway.training.optimizer import Optimizer
from fairway.training.schedule import TrainSettings

# Milliseconds of a step on one H200 with flash-attn-4, the column flash-attn-4 of the table in benchmarks/RESULTS.md.
MEASURED_MS = {"r1150": 507, "r1172": 515, "r1488": 522, "r1958": 588}
# Machines of one kind differ by a few percent, and flash-attn-4 makes up to 16 %. What takes longer than that is slow.
SLOW = 1.25


def step_verdict(record: str, gpu: int = 0, *, steps: int = 5) -> str:
    """One line on how long a step of records/<record>.yaml takes on the first GPU, beside what was measured.

    `gpu` is the number by which the line calls it.
    """
    params = load_params(f"records/{record}.yaml")
    try:
        step = Step(params.model, params.train, alone(torch.device("cuda", 0)), looped=False)
        step()
        found_ms = statistics.median(1000 * timed(step) for _ in range(steps))
    # Whatever goes wrong here would go wrong in training, and is what a user has to know; nothing is lost by it.
    except Exception as error:
        said = str(error).partition("\n")[0]
        return f"✗ a training step of {record} fails on GPU {gpu}: {type(error).__name__}: {said}"
    return judged(record, gpu, found_ms)


def judged(record: str, gpu: int, found_ms: float) -> str:
    """The line for a step of so many milliseconds on the GPU of this number."""
    ratio = found_ms / MEASURED_MS[record]
    line = (
        f"one training step of {record} takes {found_ms:.0f} ms on GPU {gpu}, {ratio:.2f} times as long as the "
        f"{MEASURED_MS[record]} ms of an H200 (benchmarks/RESULTS.md)"
    )
    slow = (
        "expected flash-attn-4 on a cool GPU of this kind, used by nobody else; "
        "take another machine before it costs money"
    )
    return f"✗ {line}: {slow}" if ratio > SLOW else f"✓ {line}"


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


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes, the GPU's work included."""
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started_at
