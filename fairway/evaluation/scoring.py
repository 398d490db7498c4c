"""The one scoring core: windows through the network in batches, logits on the scored places only.

Legend: B windows, T tokens of a window, X its last places that are looked at, D model width, M scored places of a
batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from fairway.evaluation.collect import POINTS
from fairway.evaluation.cuda_graph import graphed
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.windows import Windows, in_groups, overlapping_hidden, published, scored_once
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World


@dataclass(frozen=True)
class Batch:
    """Windows that go through the network together. Beyond the stream's end, tokens and targets are 0.

    On a GPU batches are filled up with windows that score nothing, so that few shapes are met: attention is planned for
    each. Hidden states are known at the last X places of each window; it scores none of the others.
    """

    windows: Windows
    # The windows' first scored offsets and tokens inside the stream, (B,) int64 on the device.
    first_B: Tensor
    length_B: Tensor
    # Inputs (B, T) and targets (B, X), int64 on the device.
    tokens_BT: Tensor
    targets_BX: Tensor
    # Scored places as rows of (B·X), and the positions of the stream they are: (M,) int64 on the device.
    rows_M: Tensor
    positions_M: Tensor


# Windows of a batch on a GPU that no recorded pass takes: a multiple of this, or all that a batch has.
FILLED = 32
# Batches of a large chunk: a multiple of this.
EVEN = 8

# From the final hidden state (B, X, D) of a batch to the logits (M, V) float32 of its scored places.
Head = Callable[[GPT, Batch, Tensor], Tensor]


def plain_head(model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
    """The network's own logits."""
    return model.logits(hid_BXD.flatten(0, 1)[batch.rows_M])


def make_batch(tokens_N1: Tensor, windows: Windows, *, seq_len: int, width: int | None = None) -> Batch:
    """Cut the windows out of the stream (N+1,), on whose device the batch will lie; no width means all of a window."""
    device, width = tokens_N1.device, width or seq_len
    start_B, first_B, length_B = _sent(torch.stack([windows.start, windows.first, windows.length]), device)
    offset_T = torch.arange(seq_len, device=device)
    inside_BT = offset_T < length_B[:, None]
    # Within bounds also where nothing is read from the stream.
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
    """A copy on the device, from memory of which the host need not wait until the device has reached the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class WindowPass(Pass):
    """A pass over chunks of windows, by a network that stays as it is. Batches are the same whatever the processes.

    A head that reads scored places alone says how many at a window's end those are (`width`), but for the stream's
    first and last windows: what only they need is not computed for the others. Batches of windows that begin the same
    number of tokens apart go through a recorded pass, batches with others among them through the network as it is.
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

        # Not a function of self, which would then hold itself, and the graph's memory, for longer than it is used.
        def hidden(tokens_L: Tensor) -> Tensor:
            return overlapping_hidden(model, tokens_L, spacing=spacing, last=width)

        self._hidden, self.fills_up = graphed(hidden, tokens_N1.device), tokens_N1.is_cuda

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """The predictions of every world.size-th batch of a chunk's windows."""
        groups = in_groups(self.windows[chunk], self.batch_windows)
        for group in groups[self.world.rank :: self.world.size]:
            if wanted is None or wanted[group.positions()].any():
                yield self._predict(group)

    @torch.no_grad()
    def _predict(self, group: Windows) -> Prediction:
        seq_len = self.model.config.seq_len
        missing = (self.batch_windows - len(group)) * self.fills_up
        # Earlier windows fill up a recorded pass; behind these, where nothing scores them.
        begin, end = int(group.start[0]) - missing * self.spacing, int(group.start[-1]) + seq_len
        apart = bool((group.start.diff() == self.spacing).all())
        if apart and begin >= 0 and end < len(self.tokens_N1) and int(group.first.min()) >= seq_len - self.width:
            batch = make_batch(self.tokens_N1, self._filled(group, missing), seq_len=seq_len, width=self.width)
            hid_BXD = self._hidden(self.tokens_N1[begin:end])
            if missing:
                hid_BXD = hid_BXD.roll(-missing, 0)
        else:
            batch = make_batch(self.tokens_N1, self._filled(group, min(missing, -len(group) % FILLED)), seq_len=seq_len)
            hid_BXD = self.model.hidden(batch.tokens_BT)
        return batch.positions_M, self.head(self.model, batch, hid_BXD)

    def _filled(self, group: Windows, missing: int) -> Windows:
        nothing = torch.zeros(missing, dtype=torch.int64)
        return Windows(*(torch.cat([column, nothing]) for column in (group.start, group.first, group.length)))

    def learn(self, chunk: int) -> None:
        """Nothing."""

    def state(self) -> State:
        """Nothing."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing."""


class WindowSettings(EvaluatorSettings):
    """The settings of every evaluator that scores overlapping windows of the stream."""

    # Tokens from the start of a window to the start of the next, and the last places of a window, which it scores.
    stride: int = Field(gt=0)
    # Windows that go through the network together.
    batch_windows: int = Field(gt=0)
    # Score the last tokens repeatedly, as PR #1150, #1172 and #1488 did (evaluation/windows.py).
    published_window_list: bool

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """A larger stride would leave gaps between the windows."""
        if self.stride > model.seq_len:
            raise ValueError(f"{section}.stride ({self.stride}) exceeds model.seq_len ({model.seq_len})")


def stream_windows(model: GPT, targets: int, *, stride: int, as_published: bool) -> Windows:
    """The windows of a stream of so many targets, of which each scores its last `stride` places or fewer."""
    return (published if as_published else scored_once)(targets, seq_len=model.config.seq_len, stride=stride)


def in_chunks(windows: Windows, batch_windows: int) -> list[Windows]:
    """Runs of whole batches, about as many as there may be resume points: chunks for evaluators that need none.

    Large ones come out even on eight processes, which all wait for the last at a chunk's end.
    """
    batches = -(-len(windows) // batch_windows)
    each = -(-batches // POINTS)
    return in_groups(windows, batch_windows * (each if each < EVEN else -(-each // EVEN) * EVEN))
