"""What scores overlapping windows for all evaluators: the network in batches of windows, and logits of scored places.

Legend: N targets, B windows of a batch, T tokens of a window, X its last places whose hidden states are computed, L
tokens of the stretch that a batch covers, D model width, M scored places of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairway.evaluation.collect import POINTS
from fairway.evaluation.cuda_graph import as_cuda_graph
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.windows import (
    Windows,
    by_chunk,
    in_groups,
    overlapping_hidden,
    published,
    runs,
    scored_once,
    within_documents,
)
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World


@dataclass(frozen=True)
class Batch:
    """Windows that go through the network together, and score none but places among their last X.

    Beyond the stream's end, tokens and targets are 0. On a GPU, a batch may be filled up with windows that score
    nothing. Few different shapes are then met, which saves time, because attention is planned for each.
    """

    windows: Windows
    # As windows.first and windows.length, (B,) int64 on the device.
    first_B: Tensor
    length_B: Tensor
    # Inputs (B, T) and targets (B, X), int64 on the device.
    tokens_BT: Tensor
    targets_BX: Tensor
    # Scored places, counted through the last X of all windows, and their positions in the stream: (M,) int64 on the
    # device.
    rows_M: Tensor
    positions_M: Tensor


# On a GPU, a batch that does not go through a recorded pass is filled up to one of so many sizes.
SIZES = 16
# The number of batches in a large chunk is a multiple of this.
EVEN = 8

# Makes of a batch's final hidden states (B, X, D) the logits (M, V) float32 of its scored places.
Head = Callable[[GPT, Batch, Tensor], Tensor]


def plain_head(model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
    """The network's own logits."""
    return model.logits(hid_BXD.flatten(0, 1)[batch.rows_M])


@dataclass(frozen=True)
class PlaceHead:
    """A head of which the logits of a place depend on nothing but the hidden state there: `logits`, (M, D) to (M, V).

    A decoder then needs only the one place, where any other head is asked for its whole batch at every token
    (certification/stepping.py).
    """

    logits: Callable[[GPT, Tensor], Tensor]

    def __call__(self, model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
        """Logits of the scored places."""
        return self.logits(model, hid_BXD.flatten(0, 1)[batch.rows_M])


def make_batch(tokens_N1: Tensor, windows: Windows, *, seq_len: int, width: int | None = None) -> Batch:
    """Cut the windows out of the stream (N+1,), on whose device the batch will lie; `width` is X, or None for T."""
    device, width = tokens_N1.device, width or seq_len
    start_B, first_B, length_B = sent(torch.stack([windows.start, windows.first, windows.length]), device)
    offset_T = torch.arange(seq_len, device=device)
    inside_BT = offset_T < length_B[:, None]
    # Beyond the stream's end some place within it is read, and the token then set to 0.
    place_BT = (start_B[:, None] + offset_T).clamp(max=len(tokens_N1) - 2)
    return Batch(
        windows=windows,
        first_B=first_B,
        length_B=length_B,
        tokens_BT=tokens_N1[place_BT] * inside_BT,
        targets_BX=tokens_N1[place_BT[:, -width:] + 1] * inside_BT[:, -width:],
        rows_M=sent(windows.rows(seq_len, width), device),
        positions_M=sent(windows.positions(), device),
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. The host does not wait for it, which copying from pinned memory makes possible."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class WindowPass(Pass):
    """A pass over chunks of windows, by a network that is not changed by it.

    Batches do not depend on the number of processes. `head` makes logits of hidden states. `width` is how many places
    at a window's end it needs; None means all. Where all windows of a batch begin the same number of tokens apart and
    score none but those places, they go through overlapping_hidden, as a recorded pass on a GPU. Other batches, such as
    the stream's first, go through the network in the ordinary way with all their places.

    The windows of documents (WindowSettings.stretch) all go through it in that way, and the logits of many places may
    be wanted of each. So a batch has those windows alone whose scored places begin in the same `stretch` targets.
    """

    def __init__(
        self,
        model: GPT,
        tokens_N1: Tensor,
        chunks: list[Windows],
        world: World,
        *,
        batch_windows: int,
        head: Head = plain_head,
        width: int | None = None,
        stretch: int | None = None,
    ) -> None:
        self.model, self.tokens_N1, self.world = model, tokens_N1, world
        self.windows, self.batch_windows, self.stretch, self.head = chunks, batch_windows, stretch, head
        seq_len, begin = model.config.seq_len, torch.cat([windows.start for windows in chunks])
        self.chunks, self.width = len(chunks), width or seq_len
        self.spacing = spacing = int(begin[1] - begin[0]) if len(begin) > 1 else seq_len

        # This must not refer to self: self would hold it and it would hold self, and the graph's memory would be given
        # back only when Python's collector of such circles happens to run.
        def hidden(tokens_L: Tensor) -> Tensor:
            return overlapping_hidden(model, tokens_L, spacing=spacing, wanted=width)

        self._hidden, self.fills_up = as_cuda_graph(hidden, tokens_N1.device), tokens_N1.is_cuda

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """The predictions of every world.size-th batch of a chunk's windows."""
        windows = self.windows[chunk]
        stretches = runs(windows, (windows.start + windows.first) // self.stretch) if self.stretch else [windows]
        groups = [group for windows in stretches for group in in_groups(windows, self.batch_windows)]
        for group in groups[self.world.rank :: self.world.size]:
            if wanted is None or wanted[group.positions()].any():
                yield self._predict(group)

    @torch.no_grad()
    def _predict(self, group: Windows) -> Prediction:
        missing = (self.batch_windows - len(group)) * self.fills_up
        found = None if self.stretch else self._overlapping(group, missing)
        size = max(self.batch_windows // SIZES, 1)
        batch, hid_BXD = found or self._one_by_one(group, min(missing, -len(group) % size))
        return batch.positions_M, self.head(self.model, batch, hid_BXD)

    def _overlapping(self, group: Windows, missing: int) -> tuple[Batch, Tensor] | None:
        """The batch and its hidden states from overlapping_hidden, or None where that does not fit the windows.

        A pass is filled up with windows before these in the stream, because their tokens are at hand.
        """
        seq_len, stream = self.model.config.seq_len, len(self.tokens_N1)
        begin, end = int(group.start[0]) - missing * self.spacing, int(group.start[-1]) + seq_len
        evenly_spaced = bool((group.start.diff() == self.spacing).all())
        if not evenly_spaced or begin < 0 or end >= stream or int(group.first.min()) < seq_len - self.width:
            return None
        hid_BXD = self._hidden(self.tokens_N1[begin:end])
        if missing:
            # In a batch, windows that score nothing come last.
            hid_BXD = hid_BXD.roll(-missing, 0)
        return make_batch(self.tokens_N1, _filled(group, missing), seq_len=seq_len, width=self.width), hid_BXD

    def _one_by_one(self, group: Windows, missing: int) -> tuple[Batch, Tensor]:
        """The batch and its hidden states, at all places, each window computed for itself."""
        batch = make_batch(self.tokens_N1, _filled(group, missing), seq_len=self.model.config.seq_len)
        return batch, self.model.hidden(batch.tokens_BT)

    def learn(self, chunk: int) -> None:
        """Nothing is adapted; subclasses may."""

    def state(self) -> State:
        """No tensors, as nothing is adapted."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing is put back, as nothing is adapted."""


def _filled(group: Windows, missing: int) -> Windows:
    """The windows, and after them `missing` ones that score nothing."""
    nothing = torch.zeros(missing, dtype=torch.int64)
    return Windows(*(torch.cat([column, nothing]) for column in (group.start, group.first, group.length)))


class WindowSettings(EvaluatorSettings):
    """The settings of every evaluator that scores overlapping windows of the stream."""

    # Tokens from the start of a window to the start of the next, and the last places of a window, which it scores.
    stride: int = Field(gt=0)
    # Windows that go through the network together.
    batch_windows: int = Field(gt=0)
    # Score the last tokens repeatedly, as PR #1150, #1172 and #1488 did (evaluation/windows.py).
    published_window_list: bool
    # Cut windows at document starts, so that nothing is predicted from another document (evaluation/windows.py).
    within_documents: bool

    @property
    def window_list(self) -> Literal["stream", "published", "documents"]:
        """Which of LISTS the windows are."""
        if self.within_documents:
            return "documents"
        return "published" if self.published_window_list else "stream"

    @property
    def stretch(self) -> int | None:
        """Within documents, about how many targets the windows of a batch score together (see WindowPass), or None.

        At most batch_windows windows go together. Those inside of a document score `stride` places each; short
        documents are scored whole, so that in the challenge's text a window scores 240 places on average.
        """
        return 4 * self.batch_windows * self.stride if self.within_documents else None

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """A larger stride would leave gaps between the windows, and the published list does not end with documents."""
        if self.stride > model.seq_len:
            raise ValueError(f"{section}.stride ({self.stride}) exceeds model.seq_len ({model.seq_len})")
        if self.within_documents and self.published_window_list:
            raise ValueError(f"{section}.published_window_list: expected false with within_documents (found true)")

    def looked_up(self) -> dict[str, str]:
        """The list of windows."""
        return {"fairway.evaluation.scoring.LISTS": self.window_list}


# Lists of windows of a stream (N+1,). A table, so that the program that ships carries the one that its record uses.
LISTS: dict[str, Callable[..., Windows]] = {
    "stream": lambda tokens_N1, **sizes: scored_once(len(tokens_N1) - 1, **sizes),
    "published": lambda tokens_N1, **sizes: published(len(tokens_N1) - 1, **sizes),
    "documents": within_documents,
}


def stream_windows(model: GPT, tokens_N1: Tensor, settings: WindowSettings) -> Windows:
    """The windows of a stream (N+1,) that the settings name, of which most score their last `stride` places."""
    return LISTS[settings.window_list](tokens_N1, seq_len=model.config.seq_len, stride=settings.stride)


def in_chunks(windows: Windows, batch_windows: int, stretch: int | None = None) -> list[Windows]:
    """Runs of whole batches, about as many as there may be resume points: chunks where nothing is learned from them.

    A large chunk has a multiple of EVEN batches, so that eight processes, which wait for one another at its end, have
    equally many. Of the windows of documents (`stretch`: WindowSettings.stretch), chunks are tenths of the stream: in
    which one a target lies must not depend on where later documents start.
    """
    if stretch:
        targets = int(windows.start[-1] + windows.length[-1])
        return by_chunk(windows, targets=targets, chunk_tokens=-(-targets // POINTS))
    batches = -(-len(windows) // batch_windows)
    each = -(-batches // POINTS)
    return in_groups(windows, batch_windows * (each if each < EVEN else -(-each // EVEN) * EVEN))
