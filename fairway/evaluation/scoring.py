"""What scores overlapping windows for all evaluators: the network in batches of windows, and logits of scored places.

Legend: N targets, B windows of a batch, T tokens of a window, X its last places whose hidden states are computed, L
tokens of the stretch that a batch covers, D model width, M scored places of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.evaluation.collect import POINTS
from fairway.evaluation.cuda_graph import as_cuda_graph
from fairway.evaluation.overlapping import overlapping_hidden
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.windows import Windows, in_groups, published, scored_once
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError


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


# On a GPU, a batch that does not go through a recorded pass is filled up to a multiple of so many windows.
FILLED = 32
# The number of batches in a large chunk is a multiple of this.
EVEN = 8

# Makes of a batch's final hidden states (B, X, D) the logits (M, V) float32 of its scored places.
Head = Callable[[GPT, Batch, Tensor], Tensor]


def plain_head(model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
    """The network's own logits."""
    return model.logits(hid_BXD.flatten(0, 1)[batch.rows_M])


def make_batch(tokens_N1: Tensor, windows: Windows, *, seq_len: int, width: int | None = None) -> Batch:
    """Cut the windows out of the stream (N+1,), on whose device the batch will lie; `width` is X, or None for T."""
    device, width = tokens_N1.device, width or seq_len
    start_B, first_B, length_B = _sent(torch.stack([windows.start, windows.first, windows.length]), device)
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
        rows_M=_sent(windows.rows(seq_len, width), device),
        positions_M=_sent(windows.positions(), device),
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. The host does not wait for it, which copying from pinned memory makes possible."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class WindowPass(Pass):
    """A pass over chunks of windows, by a network that is not changed by it.

    Batches do not depend on the number of processes. `head` makes logits of hidden states. `width` is how many places
    at a window's end it needs; None means all. Where all windows of a batch begin the same number of tokens apart and
    score none but those places, they go through overlapping_hidden, as a recorded pass on a GPU. Other batches, such as
    the stream's first, go through the network in the ordinary way with all their places.
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
    ) -> None:
        self.model, self.tokens_N1, self.world = model, tokens_N1, world
        self.windows, self.batch_windows, self.head = chunks, batch_windows, head
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
        groups = in_groups(self.windows[chunk], self.batch_windows)
        for group in groups[self.world.rank :: self.world.size]:
            if wanted is None or wanted[group.positions()].any():
                yield self._predict(group)

    @torch.no_grad()
    def _predict(self, group: Windows) -> Prediction:
        missing = (self.batch_windows - len(group)) * self.fills_up
        batch, hid_BXD = self._overlapping(group, missing) or self._one_by_one(
            group, min(missing, -len(group) % FILLED)
        )
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


def stream_windows(section: str, model: GPT, targets: int, *, stride: int, as_published: bool) -> Windows:
    """The windows of a stream. Raises UserError if their stride, a key of `section`, would leave gaps."""
    seq_len = model.config.seq_len
    if stride > seq_len:
        raise UserError(f"params.yaml: {section}.stride ({stride}) exceeds the model's seq_len ({seq_len})")
    return (published if as_published else scored_once)(targets, seq_len=seq_len, stride=stride)


def in_chunks(windows: Windows, batch_windows: int) -> list[Windows]:
    """Runs of whole batches, about as many as there may be resume points: chunks where nothing is learned from them.

    A large chunk has a multiple of EVEN batches, so that eight processes, which wait for one another at its end, have
    equally many.
    """
    batches = -(-len(windows) // batch_windows)
    each = -(-batches // POINTS)
    return in_groups(windows, batch_windows * (each if each < EVEN else -(-each // EVEN) * EVEN))
