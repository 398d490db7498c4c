"""In which order targets are coded, and what a decoder must be told before the first of them.

In the order of the stream it is told nothing but the first token. (How many tokens there are is known to everybody.) An
evaluator that visits documents in an order of its own is causal in that order at best, and only for a decoder that is
told beforehand where documents start. What that takes is counted in bits.

Legend: N targets. Target p is token p + 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairway.certification.black_box import KEPT_STATES, Baseline
from fairway.tokens.tokenizer import BOS


@dataclass(frozen=True)
class Order:
    """All N positions in order of coding (N,) int64, and which tokens are given (N+1,) bool: known before the first."""

    name: Literal["stream", "visits"]
    positions: Tensor
    given_N1: Tensor

    def unknown(self, index: int) -> Tensor:
        """Which tokens (N+1,) bool are not known when the target at an index of the order is predicted."""
        unknown_N1 = torch.zeros_like(self.given_N1)
        unknown_N1[self.positions[index:] + 1] = True
        return unknown_N1 & ~self.given_N1

    def up_to(self, index: int, count: int) -> Tensor:
        """Which positions (N,) bool are the last `count` that are predicted up to that index, itself included."""
        marked_N = torch.zeros(len(self.positions), dtype=torch.bool)
        marked_N[self.positions[max(index + 1 - count, 0) : index + 1]] = True
        return marked_N

    def edges(self, base: Baseline) -> list[int]:
        """The indices of the first targets that are predicted behind the first chunk and behind the second.

        There are fewer where there are fewer chunks. What a pass learns from a chunk shows there for the first time.
        """
        chunk_I = base.chunk_N[self.positions]
        found = [(chunk_I > chunk).nonzero()[:1, 0].tolist() for chunk in range(KEPT_STATES)]
        return list(dict.fromkeys(index for indices in found for index in indices))

    def given_starts(self, base: Baseline) -> int:
        """How many of the given tokens start a document, but for the first token, which is always given."""
        return int((self.given_N1 & (base.tokens_N1.cpu() == BOS))[1:].sum())

    def given_others(self, base: Baseline) -> int:
        """How many other tokens are given."""
        return int((self.given_N1 & (base.tokens_N1.cpu() != BOS))[1:].sum())


def stream_order(base: Baseline) -> Order:
    """One target behind the other."""
    N = len(base.times_N)
    return Order("stream", torch.arange(N), torch.arange(N + 1) == 0)


def visiting_order(base: Baseline) -> Order:
    """As the evaluator does it; given are document starts, and tokens it reads before it has predicted them."""
    N = len(base.times_N)
    positions = base.visited
    rank_N = torch.empty(N, dtype=torch.int64)
    rank_N[positions] = torch.arange(N)
    given_N1 = base.tokens_N1.cpu() == BOS
    given_N1[0] = True
    given_N1[1:N] |= rank_N[1:] < rank_N[:-1]
    return Order("visits", positions, given_N1)
