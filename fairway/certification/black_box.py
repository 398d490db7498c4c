"""An evaluator and a network of which nothing is known but what they answer.

Legend: N targets, M targets predicted together, E events (a target predicted once), V vocabulary.
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
    """Targets that are predicted together: positions (M,) int64 and log-probabilities (M, V) float32, on the CPU."""

    chunk: int
    positions_M: Tensor
    log_probs_MV: Tensor


@dataclass(frozen=True)
class BlackBox:
    """Every run gets an evaluator and a network of its own, so that nothing can be carried from one to the next."""

    make: Callable[[], Evaluator]
    model: GPT

    def begin(self, tokens_N1: Tensor) -> Pass:
        """A pass over a stream, which it may be that somebody fills in on the way."""
        return self.make().begin(copy.deepcopy(self.model), tokens_N1, alone(tokens_N1.device))

    def claims(self, tokens_N1: Tensor) -> Tensor:
        """The nats of every target, (N,) float64: the score that is to be certified."""
        return self.make().score(copy.deepcopy(self.model), tokens_N1, lambda _: None)

    def log_probs(self, tokens_N1: Tensor, positions: list[int]) -> Tensor:
        """The distributions (P, V) float64 at chosen positions, on request."""
        return self.make().log_probs(copy.deepcopy(self.model), tokens_N1, positions)

    def events(self, tokens_N1: Tensor, learned: Callable[[int, Pass], None] = lambda *_: None) -> Iterator[Event]:
        """One pass, step by step; `learned` is told how many chunks it has learned from."""
        evaluation = self.begin(tokens_N1)
        for chunk in range(evaluation.chunks):
            for positions_M, logits_MV in evaluation.predict(chunk):
                yield Event(chunk, positions_M.cpu(), logits_MV.float().log_softmax(-1).cpu())
            evaluation.learn(chunk)
            learned(chunk + 1, evaluation)

    def fits(self, tokens_N1: Tensor) -> bool:
        """Whether the stream is long enough for the evaluator."""
        try:
            self.begin(tokens_N1)
        except UserError:
            return False
        return True


@dataclass(frozen=True)
class Record:
    """What one undisturbed pass predicted."""

    tokens_N1: Tensor
    # What its distributions say of every target (the mean, where there are several), (N,) float64.
    nats_N: Tensor
    # How often each target is predicted, (N,); the first distribution (N, V) float32; its chunk and batch, (N,).
    times_N: Tensor
    log_probs_NV: Tensor
    chunk_N: Tensor
    batch_N: Tensor
    # The targets in the order of being predicted, (E,), and whether that is the first time.
    positions_E: Tensor
    first_E: Tensor
    # What the pass had adapted behind the first chunk.
    learned: State


@dataclass(frozen=True)
class Baseline(Record):
    """With it what the evaluator claims, (N,) float64, and up to how many nats a difference may be noise."""

    claims_N: Tensor
    noise_nats: float


def baseline(box: BlackBox, tokens_N1: Tensor) -> Baseline:
    """The claims, one pass step by step, and the noise: none if both agree to the bit, else thrice that of repeats."""
    claims_N, found = box.claims(tokens_N1), _record(box, tokens_N1)
    if torch.equal(claims_N, found.nats_N):
        return Baseline(**vars(found), claims_N=claims_N, noise_nats=0.0)
    largest = max(float((_record(box, tokens_N1).nats_N - found.nats_N).abs().max()) for _ in range(2))
    return Baseline(**vars(found), claims_N=claims_N, noise_nats=max(3 * largest, 1e-5) if largest else 0.0)


def _record(box: BlackBox, tokens_N1: Tensor) -> Record:
    targets_N = tokens_N1[1:].cpu()
    N, V = len(targets_N), box.model.config.vocab_size
    nats_N, times_N = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    log_probs_NV = torch.full((N, V), torch.nan)
    chunk_N, batch_N = torch.full((2, N), -1)
    positions, first = [], []
    learned: State = {}

    def keep(chunks: int, evaluation: Pass) -> None:
        if chunks == 1:
            learned.update({name: value.clone() for name, value in evaluation.state().items()})

    for batch, event in enumerate(box.events(tokens_N1, keep)):
        p = event.positions_M
        nats_N.index_add_(0, p, F.nll_loss(event.log_probs_MV, targets_N[p], reduction="none").double())
        index_M = torch.arange(len(p))
        earliest_N = torch.full((N,), len(p)).scatter_reduce(0, p, index_M, "amin")
        new = (times_N[p] == 0) & (earliest_N[p] == index_M)
        times_N.index_add_(0, p, torch.ones_like(p))
        log_probs_NV[p[new]] = event.log_probs_MV[new]
        chunk_N[p[new]], batch_N[p[new]] = event.chunk, batch
        positions.append(p)
        first.append(new)
    return Record(
        tokens_N1=tokens_N1,
        nats_N=nats_N / times_N,
        times_N=times_N,
        log_probs_NV=log_probs_NV,
        chunk_N=chunk_N,
        batch_N=batch_N,
        positions_E=torch.cat(positions),
        first_E=torch.cat(first),
        learned=learned,
    )
