"""Token shards to micro-batches, in an order that does not depend on how many processes share the work.

Tokens reads all shards of a split as one stream. An Order (data_orders.py) says where in it the M micro-batches of the
next step begin. A Stream cuts this process's share of them: process r of R takes micro-batches r, r + R, ... of every
step. A Prefetcher does that ahead of time, in a thread.

Legend: M micro-batches of a step over all processes, L tokens of a micro-batch, B rows of it, T tokens of a row.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fairway.runtime.errors import UserError
from fairway.tokens.shards import open_shard

# What an order or a stream needs to go on later from where it is; fit for JSON.
State = dict[str, Any]
# Takes the inputs (L,) of a packed row, returns the bounds (n,) int32 of its segments.
Segmenter = Callable[[np.ndarray], np.ndarray]


class Batch(NamedTuple):
    """One micro-batch: inputs and targets (B, T) int64, and the bounds (n,) int32 of a packed row's segments, or None.

    Tokens of different segments do not see each other. Attention knows the bounds as cu_seqlens.
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same micro-batch on a device. The host does not wait for the copy where the batch is in pinned memory."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]


class Tokens:
    """The shards of a split as one stream of `total` tokens; position p is the p-th token of the shards put in a row.

    Opening them checks headers and lengths only, since the records' shards are 16 GB. Token ids are checked as they are
    read. Raises UserError on a damaged shard, or if there are no tokens.
    """

    def __init__(self, paths: list[Path], *, vocab_size: int) -> None:
        self.folder, self.vocab_size = paths[0].parent, vocab_size
        self.shards = [open_shard(path, vocab_size=None) for path in paths]
        self.lengths = [len(shard) for shard in self.shards]
        self.ends = np.cumsum(self.lengths)
        self.total = int(self.ends[-1])
        if not self.total:
            raise UserError(f"{self.folder}: the train shards hold no tokens")

    def start(self, shard: int) -> int:
        """The position of a shard's first token."""
        return int(self.ends[shard]) - self.lengths[shard]

    def read(self, position: int, count: int) -> np.ndarray:
        """The tokens (count,) int64 from `position` on; behind the last token of all shards comes the first one again.

        Raises UserError on a token id outside the vocabulary.
        """
        pieces: list[np.ndarray] = []
        while count:
            position %= self.total
            shard = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - self.start(shard)
            piece = self.shards[shard][offset : offset + count]
            pieces.append(piece)
            position, count = position + len(piece), count - len(piece)
        tokens = np.concatenate(pieces).astype(np.int64)
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{self.folder}: token {largest} lies outside the vocabulary of {self.vocab_size}")
        return tokens


class Order(Protocol):
    """Says where the micro-batches of each step begin. The same state always gives the same steps from there on."""

    # A span is a run of `span` + 1 tokens: all but the last of them are inputs, all but the first are the targets.
    span: int

    def draw(self) -> list[list[int]]:
        """For each of the next step's M micro-batches, the positions at which its spans begin."""

    def state_dict(self) -> State:
        """What load_state_dict needs to go on from here."""

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned."""


class Stream:
    """This process's micro-batches, cut where an Order says.

    The spans of a micro-batch are cut into rows of `row` tokens. With `segment`, which splits a row into documents, a
    micro-batch is a single span and a single row.
    """

    def __init__(
        self,
        tokens: Tokens,
        order: Order,
        *,
        row: int,
        rank: int = 0,
        size: int = 1,
        segment: Segmenter | None = None,
    ) -> None:
        self.tokens, self.order, self.segment = tokens, order, segment
        self.row, self.rank, self.size = row, rank, size
        self.before: State = order.state_dict()
        self.queue: list[list[int]] = []
        self.taken = 0

    def next_batch(self) -> Batch:
        """The next micro-batch, on the CPU. Raises UserError on a token id outside the vocabulary."""
        if not self.queue:
            self.before, self.taken = self.order.state_dict(), 0
            self.queue = self.order.draw()[self.rank :: self.size]
        spans = [self.tokens.read(position, self.order.span + 1) for position in self.queue.pop(0)]
        self.taken += 1
        segments = None if self.segment is None else torch.from_numpy(self.segment(spans[0][:-1]))
        # Inputs and targets are copied into one block of memory, in which each begins at an aligned address.
        both = torch.from_numpy(np.stack([[span[:-1] for span in spans], [span[1:] for span in spans]]))
        inputs, targets = both.view(2, -1, self.row)
        return Batch(inputs, targets, segments)

    def state_dict(self) -> State:
        """The order's state before the step under way, and how many of this process's micro-batches of it are taken."""
        if not self.queue:
            return {"order": self.order.state_dict(), "taken": 0}
        return {"order": self.before, "taken": self.taken}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned.

        The number of processes may differ from the one that saved it only if the state lies between two steps (taken is
        0), since another number shares the micro-batches of a step differently.
        """
        self.order.load_state_dict(state["order"])
        self.queue = []
        if state["taken"]:
            self.before, self.taken = self.order.state_dict(), state["taken"]
            self.queue = self.order.draw()[self.rank :: self.size][self.taken :]


class Prefetcher:
    """Cuts the next micro-batches of a Stream ahead of time in a thread, and hands them out on the device."""

    def __init__(self, stream: Stream, device: torch.device, *, ahead: int = 2) -> None:
        self.stream, self.device, self.ahead = stream, device, ahead
        self.segment, self.state = stream.segment, stream.state_dict()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.ready: deque[Future[tuple[Batch, State]]] = deque()

    def next_batch(self) -> Batch:
        """The next micro-batch, on the device. Raises what the stream raised while it was cut."""
        while len(self.ready) <= self.ahead:
            self.ready.append(self.worker.submit(self._cut))
        batch, self.state = self.ready.popleft().result()
        return batch.to(self.device)

    def _cut(self) -> tuple[Batch, State]:
        """Runs in the thread: the next micro-batch, and the stream's state behind it."""
        batch = self.stream.next_batch()
        if self.device.type == "cuda":
            batch = Batch(*(None if part is None else part.pin_memory() for part in batch))  # type: ignore[arg-type]
        return batch, self.stream.state_dict()

    def state_dict(self) -> State:
        """The stream's state behind the last micro-batch that was handed out, whatever was cut ahead of it."""
        return self.state

    def load_state_dict(self, state: State) -> None:
        """Go on from a state that state_dict returned, and drop what was cut ahead."""
        while self.ready:
            self.ready.popleft().result()
        self.stream.load_state_dict(state)
        self.state = state

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.shutdown(cancel_futures=True)
