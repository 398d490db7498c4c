"""An evaluator and a network of which nothing is known but what they answer, and what one undisturbed pass answers.

Legend: N targets, M targets predicted together, P positions, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.passes import Pass, State
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError


@dataclass(frozen=True)
class Event:
    """Targets that are predicted together: positions (M,) int64 on the CPU, log-probabilities (M, V) float32 on the
    network's device."""

    chunk: int
    positions_M: Tensor
    log_probs_MV: Tensor


@dataclass(frozen=True)
class BlackBox:
    """Every run gets an evaluator and a network of its own, so that nothing can be carried from one to the next."""

    make: Callable[[], Evaluator]
    model: GPT

    def begin(self, tokens_N1: Tensor) -> Pass:
        """A pass over a stream (N+1,), whose tokens may still be filled in while it is under way."""
        return self.make().begin(copy.deepcopy(self.model), tokens_N1, alone(tokens_N1.device))

    def fits(self, tokens_N1: Tensor) -> bool:
        """Whether the stream is long enough for the evaluator."""
        try:
            self.begin(tokens_N1)
        except UserError:
            return False
        return True

    def claims(self, tokens_N1: Tensor) -> Tensor:
        """The nats of every target, (N,) float64: the score that is to be certified."""
        return self.make().score(copy.deepcopy(self.model), tokens_N1, lambda _: None)

    def log_probs(self, tokens_N1: Tensor, positions: list[int]) -> Tensor:
        """The distributions (P, V) float64 at chosen positions, on request."""
        return self.make().log_probs(copy.deepcopy(self.model), tokens_N1, positions)

    def events(
        self,
        tokens_N1: Tensor,
        *,
        wanted: Tensor | None = None,
        first_chunk: int = 0,
        state: State | None = None,
        between: Callable[[Pass], None] = lambda _: None,
    ) -> Iterator[Event]:
        """The predictions of a pass, batch by batch; the pass learns from each chunk before it predicts the next.

        Batches without a position in `wanted` (N,) bool may be left out. With `first_chunk` the pass begins there, from
        the state in which another one had learned from all chunks before. `between` is shown the pass before its first
        chunk and behind every one that it has learned from.
        """
        evaluation = self.begin(tokens_N1)
        if state is not None:
            evaluation.restore(copied(state))
        between(evaluation)
        for chunk in range(first_chunk, evaluation.chunks):
            for positions_M, logits_MV in evaluation.predict(chunk, wanted):
                yield Event(chunk, positions_M.cpu(), logits_MV.float().log_softmax(-1))
            evaluation.learn(chunk)
            between(evaluation)


def copied(state: State) -> State:
    """The same state in memory of its own, since a pass goes on to change what it is given."""
    return {name: value.clone() for name, value in state.items()}


@dataclass(frozen=True)
class Layout:
    """The layout of an event: its chunk, its positions (M,) int64, and which of them are predicted for the first time
    (M,) bool."""

    chunk: int
    positions_M: Tensor
    first_M: Tensor


# Chunks behind which the state of the undisturbed pass is kept, so that others can begin there.
KEPT_STATES = 2


@dataclass(frozen=True)
class Record:
    """What one undisturbed pass predicted."""

    tokens_N1: Tensor
    # What its distributions say of every target (the mean, where there are several), (N,) float64.
    nats_N: Tensor
    # How often each target is predicted, (N,); of its first prediction the distribution (N, V) float32, on the
    # network's device, and the chunk and the number of the batch, (N,).
    times_N: Tensor
    log_probs_NV: Tensor
    chunk_N: Tensor
    batch_N: Tensor
    batches: list[Layout]
    # What the pass had adapted behind its first chunks, and behind how many of these it was something new.
    states: list[State]
    updates: int

    @property
    def visited(self) -> Tensor:
        """All positions in the order of their first prediction."""
        return torch.cat([batch.positions_M[batch.first_M] for batch in self.batches])

    @property
    def in_order(self) -> bool:
        """Whether targets are predicted one behind the other."""
        return bool((torch.cat([batch.positions_M for batch in self.batches]).diff() > 0).all())


@dataclass(frozen=True)
class Baseline(Record):
    """With it what the evaluator claims, (N,) float64, and up to how many nats a difference may be noise."""

    claims_N: Tensor
    noise_nats: float


def baseline(box: BlackBox, tokens_N1: Tensor) -> Baseline:
    """The claims, one pass batch by batch, and the noise.

    There is none if both agree to the bit; otherwise it is three times what repeated passes differ by.
    """
    claims_N, found = box.claims(tokens_N1), _record(box, tokens_N1)
    if torch.equal(claims_N, found.nats_N):
        return Baseline(**vars(found), claims_N=claims_N, noise_nats=0.0)
    largest = max(float((_record(box, tokens_N1).nats_N - found.nats_N).abs().max()) for _ in range(2))
    return Baseline(**vars(found), claims_N=claims_N, noise_nats=max(3 * largest, 1e-5) if largest else 0.0)


class _States:
    """Keeps the states of a pass before its first chunk and behind the first KEPT_STATES that are not its last."""

    def __init__(self) -> None:
        self.kept: list[State] = []

    def keep(self, evaluation: Pass) -> None:
        if len(self.kept) <= min(KEPT_STATES, evaluation.chunks - 1):
            self.kept.append(copied(evaluation.state()))

    def updates(self) -> int:
        """How often the state was another one behind a chunk than before it."""
        return sum(not _same(before, after) for before, after in zip(self.kept, self.kept[1:], strict=False))


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _record(box: BlackBox, tokens_N1: Tensor) -> Record:
    N, V, states = len(tokens_N1) - 1, box.model.config.vocab_size, _States()
    nats_N, times_N = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    log_probs_NV = torch.full((N, V), torch.nan, device=tokens_N1.device)
    chunk_N, batch_N = torch.full((2, N), -1)
    batches: list[Layout] = []
    for event in box.events(tokens_N1, between=states.keep):
        p = event.positions_M
        nats_M = F.nll_loss(event.log_probs_MV, tokens_N1[p.to(tokens_N1.device) + 1], reduction="none")
        nats_N.index_add_(0, p, nats_M.double().cpu())
        first_M = _firsts(p, times_N)
        times_N.index_add_(0, p, torch.ones_like(p))
        log_probs_NV[p[first_M].to(tokens_N1.device)] = event.log_probs_MV[first_M.to(tokens_N1.device)]
        chunk_N[p[first_M]], batch_N[p[first_M]] = event.chunk, len(batches)
        batches.append(Layout(event.chunk, p, first_M))
    return Record(
        tokens_N1=tokens_N1,
        nats_N=nats_N / times_N,
        times_N=times_N,
        log_probs_NV=log_probs_NV,
        chunk_N=chunk_N,
        batch_N=batch_N,
        batches=batches,
        states=states.kept[1:],
        updates=states.updates(),
    )


def _firsts(positions_M: Tensor, times_N: Tensor) -> Tensor:
    """Which of the positions (M,) are predicted for the first time, and stand for the first time among these."""
    index_M = torch.arange(len(positions_M))
    earliest_N = torch.full((len(times_N),), len(positions_M)).scatter_reduce(0, positions_M, index_M, "amin")
    return (times_N[positions_M] == 0) & (earliest_N[positions_M] == index_M)
