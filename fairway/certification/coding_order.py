"""In which order targets are coded, and what is known before each of them.

The order of the stream needs nothing but the first token. An evaluator that visits documents in an order of its own is
causal in that order only, and only if it is told beforehand where they start: those tokens are given, and counted.

Legend: N targets. Target p is token p + 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairway.certification.black_box import Baseline
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

    def known_targets(self, index: int) -> Tensor:
        """Which positions (N,) bool are predicted up to that index, itself included."""
        predicted_N = torch.zeros(len(self.positions), dtype=torch.bool)
        predicted_N[self.positions[: index + 1]] = True
        return predicted_N

    def learned_from(self, baseline: Baseline) -> int:
        """The first index that is predicted behind the first chunk; N if there is none."""
        behind = (baseline.chunk_N[self.positions] > 0).nonzero()
        return int(behind[0]) if len(behind) else len(self.positions)

    def given_bits(self, vocab_size: int) -> float:
        """What it costs at most to tell the given tokens and their places, but for the first one."""
        N, given = len(self.positions), int(self.given_N1[1:].sum())
        places = (math.lgamma(N + 1) - math.lgamma(given + 1) - math.lgamma(N - given + 1)) / math.log(2)
        return places + given * math.log2(vocab_size)


def stream_order(baseline: Baseline) -> Order:
    """One target behind the other."""
    N = len(baseline.times_N)
    return Order("stream", torch.arange(N), torch.arange(N + 1) == 0)


def visiting_order(baseline: Baseline) -> Order:
    """As the evaluator does it; given are document starts, and tokens it reads before it has predicted them."""
    N = len(baseline.times_N)
    positions = baseline.positions_E[baseline.first_E]
    rank_N = torch.empty(N, dtype=torch.int64)
    rank_N[positions] = torch.arange(N)
    given_N1 = baseline.tokens_N1.cpu() == BOS
    given_N1[0] = True
    given_N1[1:N] |= rank_N[1:] < rank_N[:-1]
    return Order("visits", positions, given_N1)
