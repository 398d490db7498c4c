"""Token shards to micro-batches, in an order that does not depend on how many processes share the work.

Legend: M micro-batches a step over all processes, L tokens a micro-batch, B rows, T tokens a row.

An Order says where in the concatenated shards the M micro-batches of the next step begin, as if M processes each took
one (the published programs ran with M = 8). A Stream cuts them: process r of R takes micro-batches r, r + R, ... of
each M. A Prefetcher stays ahead of it in a thread. The Order here is the sequential one of PR #1150 and #1488; the
others are in windows.py and packing.py.
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

State = dict[str, Any]
# Inputs (L,) of a packed row to the bounds (n,) int32 of its segments.
Segmenter = Callable[[np.ndarray], np.ndarray]


class Batch(NamedTuple):
    """One micro-batch: inputs and targets (B, T) int64; segments are cu_seqlens int32 of a packed row, or None."""

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from pinned memory the copy does not block."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]


class Tokens:
    """Shards as one endless cycle of tokens; position p is the p-th token of the concatenation.

    Opening checks headers and lengths only (the records' shards are 16 GB); token ids are checked as they are read.
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
        """Position of a shard's first token."""
        return int(self.ends[shard]) - self.lengths[shard]

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` consecutive tokens (count,) int64 from `position` on, starting over behind the last."""
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
    """Where the micro-batches of a step begin; deterministic, and resumable from a JSON-able state."""

    # Inputs of a span; a span is that many tokens and one more, read from one position.
    span: int

    def draw(self) -> list[list[int]]:
        """The positions of the spans of each of the next step's M micro-batches."""

    def state_dict(self) -> State:
        """What load_state_dict needs to go on from here."""

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""


class Sequential:
    """One cursor over everything: micro-batch after micro-batch of L + 1 tokens, not overlapping (PR #1150, #1488)."""

    def __init__(self, *, micro_batches: int, micro_batch_tokens: int) -> None:
        self.micro_batches, self.span = micro_batches, micro_batch_tokens
        self.position = 0

    def draw(self) -> list[list[int]]:
        """Consecutive spans, one a micro-batch."""
        starts = [[self.position + i * (self.span + 1)] for i in range(self.micro_batches)]
        self.position += self.micro_batches * (self.span + 1)
        return starts

    def state_dict(self) -> State:
        """The cursor."""
        return {"position": self.position}

    def load_state_dict(self, state: State) -> None:
        """Set the cursor."""
        self.position = state["position"]


class Stream:
    """This process's micro-batches, cut where an Order says.

    Rows have `row` tokens, or are whole spans where `segment` splits them into documents.
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
        """The next micro-batch, on the CPU."""
        if not self.queue:
            self.before, self.taken = self.order.state_dict(), 0
            self.queue = self.order.draw()[self.rank :: self.size]
        spans = [self.tokens.read(position, self.order.span + 1) for position in self.queue.pop(0)]
        self.taken += 1
        segments = None if self.segment is None else torch.from_numpy(self.segment(spans[0][:-1]))
        # One block, so that inputs and targets each begin aligned.
        both = torch.from_numpy(np.stack([[span[:-1] for span in spans], [span[1:] for span in spans]]))
        inputs, targets = both.view(2, -1, self.row)
        return Batch(inputs, targets, segments)

    def state_dict(self) -> State:
        """The order's state before the step under way, and how many of this process's micro-batches are taken."""
        if not self.queue:
            return {"order": self.order.state_dict(), "taken": 0}
        return {"order": self.before, "taken": self.taken}

    def load_state_dict(self, state: State) -> None:
        """Go on from there; with another number of processes only between steps (taken = 0)."""
        self.order.load_state_dict(state["order"])
        self.queue = []
        if state["taken"]:
            self.before, self.taken = self.order.state_dict(), state["taken"]
            self.queue = self.order.draw()[self.rank :: self.size][self.taken :]


class Prefetcher:
    """A Stream whose next micro-batches are cut ahead of time in one thread, and put on the device."""

    def __init__(self, stream: Stream, device: torch.device, *, ahead: int = 2) -> None:
        self.stream, self.device, self.ahead = stream, device, ahead
        self.segment, self.state = stream.segment, stream.state_dict()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.ready: deque[Future[tuple[Batch, State]]] = deque()

    def next_batch(self) -> Batch:
        """The next micro-batch, on the device. Raises whatever cutting it raised."""
        while len(self.ready) <= self.ahead:
            self.ready.append(self.worker.submit(self._cut))
        batch, self.state = self.ready.popleft().result()
        return batch.to(self.device)

    def _cut(self) -> tuple[Batch, State]:
        batch = self.stream.next_batch()
        if self.device.type == "cuda":
            batch = Batch(*(None if part is None else part.pin_memory() for part in batch))  # type: ignore[arg-type]
        return batch, self.stream.state_dict()

    def state_dict(self) -> State:
        """The state behind the last micro-batch handed out, not the last one cut."""
        return self.state

    def load_state_dict(self, state: State) -> None:
        """Drop what was cut ahead and go on from `state`."""
        while self.ready:
            self.ready.popleft().result()
        self.stream.load_state_dict(state)
        self.state = state

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.shutdown(cancel_futures=True)
