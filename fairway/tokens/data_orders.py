"""Orders of windows of S + 1 tokens spread over all shards.

Legend: S window (a row's inputs), R micro-batches a step, q windows a micro-batch, G = R q windows a step, N tokens of
a shard, B = number of S-token blocks in it.

CoprimeWindows is PR #1172's: every step mixes shards, and a stride coprime to a shard's blocks visits each once before
any twice. ShuffledWindows is PR #1958's, there for calibration only. Both draw from NumPy's PCG64 in the order of the
published programs, so that the same seed gives the same windows.

Document-packed rows (PR #1958): one long row a micro-batch, with the bounds that keep documents apart in attention.

Legend: L tokens of a row, R micro-batches a step. Rows are cut from the stream as it comes, not at documents; the tail
of a shard that is too short for a whole step is dropped.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens.loader import State, Tokens
from fairway.tokens.tokenizer import BOS


class SequentialLoader(Section):
    """Shards as one stream, cut into micro-batches (PR #1150, #1488)."""

    kind: Literal["sequential"]


class CoprimeLoader(Section):
    """Windows from many shards at once (PR #1172)."""

    kind: Literal["coprime"]
    # The names that seed the order, %d standing for a shard's number: the record hashed the paths of its shards.
    names: str = Field(pattern=r"^[^%]*%\d*d[^%]*$")


class PackedLoader(Section):
    """Rows of a whole micro-batch whose documents do not see each other (PR #1958)."""

    kind: Literal["packed"]
    # Segment bounds are padded to a multiple of so many: fewer lengths, fewer graphs to compile.
    bucket: int = Field(gt=0)


class ShuffledLoader(Section):
    """Windows of shuffled shards (PR #1958's calibration); needs a shard for each micro-batch of a step."""

    kind: Literal["shuffled"]


LoaderSettings = Annotated[
    SequentialLoader | CoprimeLoader | PackedLoader | ShuffledLoader,
    Field(discriminator="kind"),
]


# PR #1172: the mixture moves from its first to its last value over so many micro-batches of 8 processes (steps here).
MIXING_STEPS = 1800


def name_seed(names: list[str]) -> int:
    """The 64-bit seed that PR #1172 takes from the paths of its shards, an FNV-1a hash that begins at 0."""
    seed = 0
    for byte in "".join(names).encode("utf-8"):
        seed = (seed ^ byte) * 1099511628211 % 2**64
    return seed


@dataclass
class Cursor:
    """A walk over the blocks of one shard: block (first + taken * stride) mod blocks, all moved by `phase` tokens."""

    phase: int
    first: int
    stride: int
    blocks: int
    taken: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, tokens: int, window: int) -> "Cursor":
        """A fresh walk; draws phase, first block and stride, in this order."""
        phase = draw_phase(rng, tokens, window)
        blocks = (tokens - 1 - phase) // window
        first = int(rng.integers(blocks)) if blocks > 1 else 0
        stride = 1
        while blocks > 1:
            stride = int(rng.integers(1, blocks))
            if math.gcd(stride, blocks) == 1:
                break
        return cls(phase, first, stride, blocks)

    def next(self, window: int) -> int:
        """Where the next window begins in its shard."""
        block = (self.first + self.taken * self.stride) % self.blocks
        self.taken += 1
        return self.phase + window * block


def draw_phase(rng: np.random.Generator, tokens: int, window: int) -> int:
    """By how many tokens the blocks of a shard are moved; nothing is drawn where there is no choice."""
    most = min(window - 1, max(0, tokens - window - 1))
    return int(rng.integers(most + 1)) if most > 0 else 0


class CoprimeWindows:
    """PR #1172's sampler, for R processes whatever the number that runs: it was published for R = 8."""

    def __init__(self, tokens: Tokens, *, window: int, micro_batches: int, windows: int, seed: int) -> None:
        self.tokens, self.span, self.micro_batches = tokens, window, micro_batches
        self.windows = windows * micro_batches
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.shards = [i for i, n in enumerate(tokens.lengths) if n > window]
        if not self.shards:
            raise UserError(f"{tokens.folder}: no shard has a window of {window} + 1 tokens (model.seq_len)")
        self.cursors: dict[int, Cursor] = {}
        self.drawn = 0

    def draw(self) -> list[list[int]]:
        """The windows of the next step: micro-batch r has windows r, r + R, ... of one interleaved list."""
        buckets = [self._take(shard, count) for shard, count in self._counts()]
        self.drawn += 1
        order: list[int] = []
        active = [bucket for bucket in buckets if bucket]
        while active:
            active = [active[i] for i in self.rng.permutation(len(active))]
            order += [bucket.pop() for bucket in active]
            active = [bucket for bucket in active if bucket]
        return [order[r :: self.micro_batches] for r in range(self.micro_batches)]

    def _counts(self) -> list[tuple[int, int]]:
        """Which shards the step mixes and how many windows each gives: more shards as training goes on."""
        progress = min(self.drawn / MIXING_STEPS, 1.0)
        weights = self._weights(0.9 - 0.4 * progress)
        eligible, R = len(self.shards), self.micro_batches
        low, high = (min(max(*bounds), eligible, self.windows) for bounds in ((8, R), (32, 8 * R)))
        mixed = min(max(round(low + progress * (high - low)), 1), eligible, self.windows)
        chosen = self.rng.choice(eligible, size=mixed, replace=False, p=weights)
        share = weights[chosen] / weights[chosen].sum()
        counts = 1 + self.rng.multinomial(self.windows - mixed, share)
        return [(self.shards[chosen[i]], int(counts[i])) for i in self.rng.permutation(mixed)]

    def _weights(self, power: float) -> np.ndarray:
        """Chance of each shard, by the blocks it has left."""
        left = []
        for shard in self.shards:
            cursor = self.cursors.get(shard)
            whole = (self.tokens.lengths[shard] - 1) // self.span
            left.append(max(cursor.blocks - cursor.taken, 1) if cursor else whole)
        weights = np.array(left, dtype=np.float64) ** power
        return weights / weights.sum()

    def _take(self, shard: int, count: int) -> list[int]:
        """`count` windows of a shard, shuffled if there are several; a walk that has seen every block begins anew."""
        taken = []
        for _ in range(count):
            cursor = self.cursors.get(shard)
            if cursor is None or cursor.taken >= cursor.blocks:
                cursor = self.cursors[shard] = Cursor.draw(self.rng, self.tokens.lengths[shard], self.span)
            taken.append(self.tokens.start(shard) + cursor.next(self.span))
        return [taken[i] for i in self.rng.permutation(count)] if count > 1 else taken

    def state_dict(self) -> State:
        """Generator, walks and count."""
        walks = {str(shard): asdict(cursor) for shard, cursor in self.cursors.items()}
        return {"rng": self.rng.bit_generator.state, "walks": walks, "drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.rng.bit_generator.state = state["rng"]
        self.cursors = {int(shard): Cursor(**walk) for shard, walk in state["walks"].items()}
        self.drawn = state["drawn"]


class ShuffledWindows:
    """PR #1958's calibration windows: process r of R owns shards r, r + R, ... and has a generator of its own."""

    def __init__(self, tokens: Tokens, *, window: int, micro_batches: int, windows: int) -> None:
        if len(tokens.lengths) < micro_batches:
            raise UserError(
                f"{tokens.folder}: {len(tokens.lengths)} train shards for {micro_batches} micro-batches a step; "
                "shuffled windows need at least one each"
            )
        self.span, self.drawn = window, 0
        self.owners = [_Owner(tokens, rank, micro_batches, window) for rank in range(micro_batches)]
        self.windows = windows

    def draw(self) -> list[list[int]]:
        """The next windows of each owner."""
        self.drawn += 1
        return [[owner.next() for _ in range(self.windows)] for owner in self.owners]

    def state_dict(self) -> State:
        """How many steps were drawn: they are drawn again on loading, positions only."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        for owner in self.owners:
            owner.begin()
        self.drawn = 0
        while self.drawn < state["drawn"]:
            self.draw()


class _Owner:
    """The shards of one process and the windows left in each, taken from the end."""

    def __init__(self, tokens: Tokens, rank: int, size: int, window: int) -> None:
        self.rank, self.window = rank, window
        self.shards = [(tokens.start(i), n) for i, n in enumerate(tokens.lengths) if i % size == rank]
        if all(n <= window for _, n in self.shards):
            raise UserError(f"{tokens.folder}: the shards {rank}, {rank + size}, ... hold no window of {window} tokens")
        self.begin()

    def begin(self) -> None:
        """Seed the generator and shuffle every shard."""
        self.rng = np.random.Generator(np.random.PCG64(self.rank))
        self.left = [self._shuffle(start, n) for start, n in self.shards]

    def _shuffle(self, start: int, tokens: int) -> Any:
        phase = draw_phase(self.rng, tokens, self.window)
        blocks = max((tokens - 1 - phase) // self.window, 0)
        return (start + phase + self.window * self.rng.permutation(blocks)).tolist()

    def next(self) -> int:
        """The next window; when none is left anywhere, all shards are shuffled again."""
        counts = np.array([len(windows) for windows in self.left], dtype=np.float64)
        if not counts.sum():
            self.left = [self._shuffle(start, n) for start, n in self.shards]
            counts = np.array([len(windows) for windows in self.left], dtype=np.float64)
        shard = self.rng.choice(len(self.left), p=counts / counts.sum())
        position: int = self.left[shard].pop()
        return position


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
