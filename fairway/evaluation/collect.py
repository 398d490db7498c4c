"""From a pass to a score: run it, add up what it predicts, and turn the sums into bits per byte.

`collect` runs a pass to its end and leaves points to resume from; `distributions` reads single distributions off one.
`RunningScore` is what an evaluation shows while it goes on, and `measure` makes its final figures.

Legend: N targets, M targets predicted together, P chosen positions, V vocabulary. Target p is token p + 1 of the
stream.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.evaluation.passes import Pass
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.progress import Progress

# At most so many resume points are written in the course of an evaluation.
POINTS = 10


@dataclass(frozen=True)
class Scores:
    """Nats (N,) float64 of every target and how often it was scored (N,) int32, on the CPU.

    Each target is scored once, but for the published list of windows; then nats are its mean.
    """

    nats_N: Tensor
    times_N: Tensor
    # Seconds spent before the point that the evaluation was resumed from.
    earlier_s: float


class Points(Protocol):
    """Where resume points are kept: train's ResumePoints."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep the point behind so many chunks."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The latest point of the same evaluation, or None."""


class Tally:
    """What this process has scored: sums (N,) float64 of nats, and counts (N,) int32, on the CPU."""

    def __init__(self, targets: int) -> None:
        self.sums_N = torch.zeros(targets, dtype=torch.float64)
        self.times_N = torch.zeros(targets, dtype=torch.int32)
        # Batches not yet added up: fetching each would make the host wait for the device.
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, positions_M: Tensor, nats_M: Tensor) -> None:
        """Take the nats (M,) float64 of some positions, in which a position may come more than once."""
        self._pending.append((positions_M, nats_M))
        if len(self._pending) >= 1000:
            self.settle()

    def settle(self) -> None:
        """Add up what is pending."""
        if self._pending:
            positions, nats = (torch.cat(column).cpu() for column in zip(*self._pending, strict=True))
            self.sums_N.index_add_(0, positions, nats)
            self.times_N.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))
            self._pending.clear()

    def over_ranks(self, world: World) -> tuple[Tensor, Tensor]:
        """The sums and counts of all processes, on the CPU."""
        self.settle()
        if world.size == 1:
            return self.sums_N, self.times_N
        sums_N, times_N = (world.sum(mine.to(world.device, copy=True)).wait() for mine in (self.sums_N, self.times_N))
        return sums_N.cpu(), times_N.cpu()


def collect(
    evaluation: Pass,
    tokens_N1: Tensor,
    world: World,
    *,
    scored: Callable[[Tensor, Tensor], None],
    points: Points | None = None,
) -> Scores:
    """Run a pass to its end, on from its last resume point if `points` holds one; the scores, on every process.

    `scored` is given the positions (M,) and nats (M,) float64 that this process adds, batch by batch, on the device.
    """
    tally = Tally(len(tokens_N1) - 1)
    started_at = time.monotonic()
    first, earlier_s = _resume(evaluation, tally, world, scored, points) if points else (0, 0.0)
    for chunk in range(first, evaluation.chunks):
        for positions_M, logits_MV in evaluation.predict(chunk):
            nats_M = F.cross_entropy(logits_MV, tokens_N1[positions_M + 1], reduction="none").double()
            tally.add(positions_M, nats_M)
            scored(positions_M, nats_M)
        evaluation.learn(chunk)
        if points and _is_due(chunk + 1, evaluation.chunks):
            progress = {"chunks": chunk + 1, "elapsed_s": earlier_s + time.monotonic() - started_at}
            _save(evaluation, tally, world, points, progress)
    sums_N, times_N = tally.over_ranks(world)
    return Scores(sums_N / times_N, times_N, earlier_s)


def _is_due(done: int, chunks: int) -> bool:
    return done < chunks and done * POINTS // chunks > (done - 1) * POINTS // chunks


def _save(evaluation: Pass, tally: Tally, world: World, points: Points, progress: dict[str, Any]) -> None:
    sums_N, times_N = tally.over_ranks(world)
    state = evaluation.state()
    if world.rank == 0:
        tensors = {"nats": sums_N, "times": times_N} | {f"state/{name}": value for name, value in state.items()}
        points.save(progress["chunks"], tensors, progress)


def _resume(
    evaluation: Pass, tally: Tally, world: World, scored: Callable[[Tensor, Tensor], None], points: Points
) -> tuple[int, float]:
    """Put pass and tally where the latest point left them; the chunk to go on with and the seconds spent before."""
    point = points.load()
    if point is None:
        return 0, 0.0
    tensors, progress = point
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    evaluation.restore({name: value.to(world.device) for name, value in state.items()})
    if world.rank == 0:
        tally.sums_N, tally.times_N = tensors["nats"], tensors["times"]
    # Each process shows its share, as of what it scores itself.
    positions_M = tensors["times"].nonzero()[world.rank :: world.size, 0]
    scored(positions_M.to(world.device), tensors["nats"][positions_M].to(world.device))
    return progress["chunks"], progress["elapsed_s"]


def distributions(evaluation: Pass, tokens_N1: Tensor, positions: Sequence[int]) -> Tensor:
    """The log-distributions (P, V) float64 on the CPU that a pass commits to at chosen positions, in their order."""
    wanted = torch.zeros(len(tokens_N1) - 1, dtype=torch.bool)
    wanted[list(positions)] = True
    found: dict[int, Tensor] = {}
    for chunk in range(evaluation.chunks):
        for positions_M, logits_MV in evaluation.predict(chunk, wanted):
            kept_M = wanted[positions_M.cpu()].to(logits_MV.device)
            rows = logits_MV[kept_M].double().log_softmax(-1).cpu()
            found |= dict(zip(positions_M[kept_M].tolist(), rows, strict=True))
        if len(found) == int(wanted.sum()):
            break
        evaluation.learn(chunk)
    return torch.stack([found[position] for position in positions])


class RunningScore:
    """Sums on the device what this process has scored; the first process shows it in bits per byte now and then."""

    def __init__(self, name: str, target_bytes: Tensor, world: World, *, every_s: float = 1.0) -> None:
        """`target_bytes` (N,) int64 of every target, on the device."""
        self.bytes_N, self.processes, self.every_s = target_bytes, world.size, every_s
        self.nats = torch.zeros((), dtype=torch.float64, device=target_bytes.device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=target_bytes.device)
        self.name, self.shows = name, world.rank == 0
        self.progress: Progress | None = None
        self._unshown = 0
        self._shown_at = time.monotonic()

    def add(self, positions_M: Tensor, nats_M: Tensor) -> None:
        """Take the nats (M,) float64 of more targets; both tensors on the device."""
        self.nats += nats_M.sum()
        self.bytes += self.bytes_N[positions_M].sum()
        if self.shows and self.progress is None:
            # Its count and its time begin behind the first batch, which is what was restored where an evaluation is
            # resumed: so that it judges its speed by what it does itself.
            total = len(self.bytes_N)
            done = min(len(nats_M) * self.processes, total)
            self.progress = Progress(self.name, total, unit="tokens", start=done, processes=self.processes)
        else:
            self._unshown += len(nats_M)
        # Reading a sum makes the host wait for the device, so not at every batch.
        if time.monotonic() - self._shown_at >= self.every_s:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        if self.progress is not None:
            self.progress.update(self._unshown, bpb=float(self.nats) / (math.log(2) * max(int(self.bytes), 1)))
        self._unshown = 0

    def __enter__(self) -> "RunningScore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            if kind is None:
                self._show()
            self.progress.__exit__(kind, error, trace)


def measure(scores: Scores, target_bytes: Tensor) -> dict[str, Any]:
    """val_bpb, val_loss (nats per scored target), targets, how often they were scored in all, and bytes so counted.

    `target_bytes` (N,) int64. Raises UserError if a target was never scored, or if any score is not finite.
    """
    unscored = (scores.times_N == 0).nonzero()[:, 0].tolist()
    if unscored:
        raise UserError(
            f"{len(unscored)} of {len(scores.times_N)} targets were never scored, the first of them token "
            f"{unscored[0] + 1} of the validation stream; the evaluator must predict every target once"
        )
    if not scores.nats_N.isfinite().all():
        raise UserError(
            "some targets have no finite loss: the network overflows, as trained or once it has adapted "
            "(params.yaml: lower its lr)"
        )
    nats_N, bytes_N = scores.nats_N * scores.times_N, target_bytes * scores.times_N
    scored = int(scores.times_N.sum())
    return {
        "val_bpb": bpb(nats_N, bytes_N),
        "val_loss": float(nats_N.sum()) / scored,
        "targets": len(nats_N),
        "scored": scored,
        "bytes": int(bytes_N.sum()),
    }


def bpb(nats: Tensor, target_bytes: Tensor) -> float:
    """Bits per byte from the nats (N,) and the bytes (N,) of every target: Σ nats / (ln 2 · Σ bytes), in float64."""
    return float(nats.double().sum()) / (math.log(2) * int(target_bytes.sum()))
