"""Orders of the data: where in the token shards the micro-batches of each training step begin.

Each class here is an Order (loader.py) and is chosen by one kind of `train.loader`:

- Sequential (PR #1150, #1488) reads the shards from beginning to end.
- PackedRows (PR #1958) reads them in long rows, with the bounds that keep documents apart in attention.
- CoprimeWindows (PR #1172) takes every step's windows from many shards.
- ShuffledWindows (PR #1958, for calibration only) shuffles the windows of every shard.

All draw for M micro-batches a step, whatever the number of processes that share them; the records ran M = 8 processes
with one micro-batch each. The two kinds of windows draw from NumPy's PCG64 in the order of the published programs, so
that the same seed gives the same windows (training.md 2.3).

Legend: M micro-batches a step, L tokens of a micro-batch, S tokens of a window, q windows of a micro-batch, G = M q
windows of a step, N tokens of a shard, B blocks of a shard, each a place for a window.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens.loader import Segmenter, State, Tokens
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
    # Segment bounds are padded to a multiple of this many, so that there are few lengths and few graphs to compile.
    bucket: int = Field(gt=0)


class ShuffledLoader(Section):
    """Windows of shuffled shards (PR #1958's calibration); needs a shard for each micro-batch of a step."""

    kind: Literal["shuffled"]


LoaderSettings = Annotated[
    SequentialLoader | CoprimeLoader | PackedLoader | ShuffledLoader,
    Field(discriminator="kind"),
]


class Sequential:
    """PR #1150's and #1488's order: micro-batch after micro-batch of L + 1 tokens, which do not overlap.

    All shards count as one stream without an end: behind the last token comes the first one again.
    """

    def __init__(self, *, micro_batches: int, micro_batch_tokens: int) -> None:
        self.micro_batches, self.span = micro_batches, micro_batch_tokens
        self.position = 0

    def draw(self) -> list[list[int]]:
        """Where the next M consecutive spans begin, one for each micro-batch."""
        starts = [[self.position + i * (self.span + 1)] for i in range(self.micro_batches)]
        self.position += self.micro_batches * (self.span + 1)
        return starts

    def state_dict(self) -> State:
        """The position of the next span."""
        return {"position": self.position}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned."""
        self.position = state["position"]


class PackedRows:
    """PR #1958's order: consecutive rows of L + 1 tokens, shard after shard, M rows a step.

    A shard begins at its first BOS. From there rows are cut without regard to documents; where documents begin inside a
    row, document_bounds says. The tail of a shard that is too short for a whole step is dropped.
    """

    def __init__(self, tokens: Tokens, *, micro_batches: int, micro_batch_tokens: int) -> None:
        self.tokens, self.micro_batches, self.span = tokens, micro_batches, micro_batch_tokens
        self.shard = self.cursor = 0
        self._open(0)

    def draw(self) -> list[list[int]]:
        """Where the next M consecutive rows of one shard begin.

        Raises UserError if no shard is long enough for a step.
        """
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
        """The number of the shard, and the position of the next row in it."""
        return {"shard": self.shard, "cursor": self.cursor}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned."""
        self.shard, self.cursor = state["shard"], state["cursor"]


def document_segmenter(loader: LoaderSettings, *, cut: int) -> Segmenter | None:
    """document_bounds for a loader that keeps documents apart, None for the others."""
    return partial(document_bounds, cut=cut, bucket=loader.bucket) if loader.kind == "packed" else None


def document_bounds(row: np.ndarray, *, cut: int, bucket: int) -> np.ndarray:
    """The segment_bounds (n,) int32 of a row of tokens (L,) whose documents begin at their BOS."""
    return segment_bounds(np.flatnonzero(row == BOS), len(row), cut=cut, bucket=bucket)


def segment_bounds(starts: np.ndarray, total: int, *, cut: int, bucket: int) -> np.ndarray:
    """Bounds (n,) int32 of the segments of a row of `total` tokens, as attention wants them (its cu_seqlens).

    A segment begins at 0 and at each of the documents' `starts`; a document of more than `cut` tokens is cut into
    segments of `cut` tokens, the last of which may be shorter. The last bound is `total`, repeated until n is a
    multiple of `bucket`, so that there are few different n and few graphs to compile.
    """
    begins = np.union1d([0], starts)
    ends = np.append(begins[1:], total)
    pieces = [np.arange(begin, end, cut) for begin, end in zip(begins, ends, strict=True)]
    bounds = np.append(np.concatenate(pieces), total)
    return np.pad(bounds, (0, -len(bounds) % bucket), constant_values=total).astype(np.int32)


# The mixture of shards moves from its first to its last form over this many steps (PR #1172).
MIXING_STEPS = 1800


class CoprimeWindows:
    """PR #1172's order: every step mixes windows of many shards.

    A walk (Cursor) leads through the blocks of each shard and visits every block once before any twice. A step chooses
    shards by chance, a shard with many blocks left more likely than others, takes windows from the walk of each, and
    deals them out so that the windows of a shard are spread over the micro-batches. More shards take part as training
    goes on.
    """

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
        """Where the G windows of the next step begin: micro-batch m gets windows m, m + M, ... of one shuffled list.

        The list is made in rounds. A round takes one window of every shard that has some left, in random order.
        """
        buckets = [self._take(shard, count) for shard, count in self._counts()]
        self.drawn += 1
        order: list[int] = []
        active = [bucket for bucket in buckets if bucket]
        while active:
            active = [active[i] for i in self.rng.permutation(len(active))]
            order += [bucket.pop() for bucket in active]
            active = [bucket for bucket in active if bucket]
        return [order[m :: self.micro_batches] for m in range(self.micro_batches)]

    def _counts(self) -> list[tuple[int, int]]:
        """The shards that the step mixes and how many windows each gives, G in all."""
        progress = min(self.drawn / MIXING_STEPS, 1.0)
        weights = self._weights(0.9 - 0.4 * progress)
        eligible, M = len(self.shards), self.micro_batches
        low, high = (min(max(*bounds), eligible, self.windows) for bounds in ((8, M), (32, 8 * M)))
        mixed = min(max(round(low + progress * (high - low)), 1), eligible, self.windows)
        chosen = self.rng.choice(eligible, size=mixed, replace=False, p=weights)
        share = weights[chosen] / weights[chosen].sum()
        counts = 1 + self.rng.multinomial(self.windows - mixed, share)
        return [(self.shards[chosen[i]], int(counts[i])) for i in self.rng.permutation(mixed)]

    def _weights(self, power: float) -> np.ndarray:
        """The chance of each shard (float64, sum 1): in proportion to the blocks that it has left, to this power."""
        left = []
        for shard in self.shards:
            cursor = self.cursors.get(shard)
            whole = (self.tokens.lengths[shard] - 1) // self.span
            left.append(max(cursor.blocks - cursor.taken, 1) if cursor else whole)
        weights = np.array(left, dtype=np.float64) ** power
        return weights / weights.sum()

    def _take(self, shard: int, count: int) -> list[int]:
        """The next `count` windows of a shard, shuffled if there are several.

        Where the walk has visited every block, a new one is drawn.
        """
        taken = []
        for _ in range(count):
            cursor = self.cursors.get(shard)
            if cursor is None or cursor.taken >= cursor.blocks:
                cursor = self.cursors[shard] = Cursor.draw(self.rng, self.tokens.lengths[shard], self.span)
            taken.append(self.tokens.start(shard) + cursor.next(self.span))
        return [taken[i] for i in self.rng.permutation(count)] if count > 1 else taken

    def state_dict(self) -> State:
        """The generator's state, the walk of each shard that has one, and how many steps were drawn."""
        walks = {str(shard): asdict(cursor) for shard, cursor in self.cursors.items()}
        return {"rng": self.rng.bit_generator.state, "walks": walks, "drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned."""
        self.rng.bit_generator.state = state["rng"]
        self.cursors = {int(shard): Cursor(**walk) for shard, walk in state["walks"].items()}
        self.drawn = state["drawn"]


@dataclass
class Cursor:
    """A walk over the B blocks of one shard. Its k-th visit, from k = 0, is to block (first + k * stride) mod B.

    The stride is coprime to B, so that the first B visits are to B different blocks. `phase` is the position of block 0
    in the shard, `taken` the number of visits so far.
    """

    phase: int
    first: int
    stride: int
    blocks: int
    taken: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, tokens: int, window: int) -> "Cursor":
        """A new walk over a shard of `tokens` tokens. Draws phase, first block and stride, in this order."""
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
        """Where in its shard the next window begins."""
        block = (self.first + self.taken * self.stride) % self.blocks
        self.taken += 1
        return self.phase + window * block


def draw_phase(rng: np.random.Generator, tokens: int, window: int) -> int:
    """The position of block 0 in a shard, from 0 to S - 1 but leaving room for one window.

    Nothing is drawn from the generator where 0 is the only choice.
    """
    most = min(window - 1, max(0, tokens - window - 1))
    return int(rng.integers(most + 1)) if most > 0 else 0


def name_seed(names: list[str]) -> int:
    """The 64-bit seed that PR #1172 takes from the paths of its shards: an FNV-1a hash that begins at 0."""
    seed = 0
    for byte in "".join(names).encode("utf-8"):
        seed = (seed ^ byte) * 1099511628211 % 2**64
    return seed


class ShuffledWindows:
    """PR #1958's order of calibration text: micro-batch m draws from shards m, m + M, ... with a generator of its own.

    In the record process m had these shards and drew micro-batch m.
    """

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
        """Where the next q windows of each micro-batch begin."""
        self.drawn += 1
        return [[owner.next() for _ in range(self.windows)] for owner in self.owners]

    def state_dict(self) -> State:
        """How many steps were drawn. Loading draws them again, which is cheap: no tokens are read for it."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned."""
        for owner in self.owners:
            owner.begin()
        self.drawn = 0
        while self.drawn < state["drawn"]:
            self.draw()


class _Owner:
    """The shards that one micro-batch draws from, and for each the shuffled list of windows it has left."""

    def __init__(self, tokens: Tokens, rank: int, size: int, window: int) -> None:
        self.rank, self.window = rank, window
        self.shards = [(tokens.start(i), n) for i, n in enumerate(tokens.lengths) if i % size == rank]
        if all(n <= window for _, n in self.shards):
            raise UserError(f"{tokens.folder}: the shards {rank}, {rank + size}, ... hold no window of {window} tokens")
        self.begin()

    def begin(self) -> None:
        """Seed the generator with the micro-batch's number and shuffle every shard."""
        self.rng = np.random.Generator(np.random.PCG64(self.rank))
        self.left = [self._shuffle(start, n) for start, n in self.shards]

    def _shuffle(self, start: int, tokens: int) -> Any:
        """Where the windows of one shard begin, in random order."""
        phase = draw_phase(self.rng, tokens, self.window)
        blocks = max((tokens - 1 - phase) // self.window, 0)
        return (start + phase + self.window * self.rng.permutation(blocks)).tolist()

    def next(self) -> int:
        """The next window, from the end of the list of a shard drawn with a chance in proportion to what is left.

        When no shard has a window left, all are shuffled again.
        """
        counts = np.array([len(windows) for windows in self.left], dtype=np.float64)
        if not counts.sum():
            self.left = [self._shuffle(start, n) for start, n in self.shards]
            counts = np.array([len(windows) for windows in self.left], dtype=np.float64)
        shard = self.rng.choice(len(self.left), p=counts / counts.sum())
        position: int = self.left[shard].pop()
        return position
