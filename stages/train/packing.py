"""Document-packed rows (PR #1958): one long row a micro-batch, with the bounds that keep documents apart in attention.

Legend: L tokens of a row, R micro-batches a step. Rows are cut from the stream as it comes, not at documents; the tail
of a shard that is too short for a whole step is dropped.
"""

import numpy as np

from stages.errors import UserError
from stages.tokenize.tokenizer import BOS
from stages.train.loader import State, Tokens


def segment_bounds(starts: np.ndarray, total: int, *, cut: int, bucket: int) -> np.ndarray:
    """Bounds (n,) int32 of the segments of a row of `total` tokens: cu_seqlens for attention.

    Segments begin at 0, at the document `starts`, and every `cut` tokens from each of these on. The last bound is
    `total`, repeated until n is a multiple of `bucket`: few different lengths, so few graphs to compile.
    """
    begins = np.union1d([0], starts)
    ends = np.append(begins[1:], total)
    pieces = [np.arange(begin, end, cut) for begin, end in zip(begins, ends, strict=True)]
    bounds = np.append(np.concatenate(pieces), total)
    return np.pad(bounds, (0, -len(bounds) % bucket), constant_values=total).astype(np.int32)


def document_bounds(row: np.ndarray, *, cut: int, bucket: int) -> np.ndarray:
    """segment_bounds of a row of tokens (L,), whose documents begin at their BOS."""
    return segment_bounds(np.flatnonzero(row == BOS), len(row), cut=cut, bucket=bucket)


class PackedRows:
    """Consecutive rows of L + 1 tokens, shard after shard, from each shard's first BOS on, R rows a step."""

    def __init__(self, tokens: Tokens, *, micro_batches: int, micro_batch_tokens: int) -> None:
        self.tokens, self.micro_batches, self.span = tokens, micro_batches, micro_batch_tokens
        self.shard = self.cursor = 0
        self._open(0)

    def draw(self) -> list[list[int]]:
        """R consecutive rows of one shard."""
        step = self.micro_batches * (self.span + 1)
        for _ in self.tokens.lengths:
            if self.cursor + step <= self.tokens.lengths[self.shard]:
                break
            self._open((self.shard + 1) % len(self.tokens.lengths))
        if self.cursor + step > self.tokens.lengths[self.shard]:
            raise UserError(f"{self.tokens.folder}: no train shard holds a step of {step} tokens behind its first BOS")
        first = self.tokens.start(self.shard) + self.cursor
        self.cursor += step
        return [[first + i * (self.span + 1)] for i in range(self.micro_batches)]

    def _open(self, shard: int) -> None:
        """Go to a shard's first BOS, or to its first token if it has none."""
        self.shard, self.cursor = shard, int(np.argmax(self.tokens.shards[shard] == BOS))

    def state_dict(self) -> State:
        """Shard and place in it."""
        return {"shard": self.shard, "cursor": self.cursor}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.shard, self.cursor = state["shard"], state["cursor"]
