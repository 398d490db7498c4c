"""The one scoring core: windows through the network in batches, logits on the scored places only.

Legend: B windows, T tokens of a window, D model width, M scored places of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.gpt import GPT
from stages.distributed import World
from stages.errors import UserError
from stages.evaluate.collect import POINTS
from stages.evaluate.passes import Pass, Prediction, State
from stages.evaluate.windows import Windows, in_groups, published, scored_once


@dataclass(frozen=True)
class Batch:
    """Windows that go through the network together. Beyond the stream's end, tokens and targets are 0.

    On a GPU the last batch is filled up with windows of no tokens, so that a compiled network meets one shape only.
    """

    windows: Windows
    # The windows' first scored offsets and tokens inside the stream, (B,) int64 on the device.
    first_B: Tensor
    length_B: Tensor
    # Inputs and targets, (B, T) int64 on the device.
    tokens_BT: Tensor
    targets_BT: Tensor
    # Scored places as rows of (B·T), and the positions of the stream they are: (M,) int64 on the device.
    rows_M: Tensor
    positions_M: Tensor


# From the final hidden state (B, T, D) of a batch to the logits (M, V) float32 of its scored places.
Head = Callable[[GPT, Batch, Tensor], Tensor]


def plain_head(model: GPT, batch: Batch, hid_BTD: Tensor) -> Tensor:
    """The network's own logits."""
    return model.logits(hid_BTD.flatten(0, 1)[batch.rows_M])


def make_batch(tokens_N1: Tensor, windows: Windows, *, seq_len: int) -> Batch:
    """Cut the windows out of the stream (N+1,), on whose device the batch will lie.

    Only a few short columns go to the device, so that the host never waits for it.
    """
    device = tokens_N1.device
    start_B, first_B, length_B = torch.stack([windows.start, windows.first, windows.length]).to(device)
    offset_T = torch.arange(seq_len, device=device)
    inside_BT = offset_T < length_B[:, None]
    # Within bounds also where nothing is read from the stream.
    place_BT = (start_B[:, None] + offset_T).clamp(max=len(tokens_N1) - 2)
    return Batch(
        windows=windows,
        first_B=first_B,
        length_B=length_B,
        tokens_BT=tokens_N1[place_BT] * inside_BT,
        targets_BT=tokens_N1[place_BT + 1] * inside_BT,
        rows_M=windows.rows(seq_len).to(device),
        positions_M=windows.positions().to(device),
    )


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for a GPU; on a CPU as it is, where compiling takes longer than it saves."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


class WindowPass(Pass):
    """A pass over chunks of windows, by a network that stays as it is. Batches are the same whatever the processes."""

    def __init__(
        self,
        model: GPT,
        tokens_N1: Tensor,
        chunks: list[Windows],
        world: World,
        *,
        batch_windows: int,
        head: Head = plain_head,
    ) -> None:
        self.model, self.tokens_N1, self.world = model, tokens_N1, world
        self.windows, self.batch_windows, self.head = chunks, batch_windows, head
        self.chunks = len(chunks)
        self._hidden = compiled(model.hidden, tokens_N1.device)

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """The predictions of every world.size-th batch of a chunk's windows."""
        groups = in_groups(self.windows[chunk], self.batch_windows)
        for group in groups[self.world.rank :: self.world.size]:
            if wanted is None or wanted[group.positions()].any():
                yield self._predict(group)

    @torch.no_grad()
    def _predict(self, group: Windows) -> Prediction:
        batch = make_batch(self.tokens_N1, self._filled(group), seq_len=self.model.config.seq_len)
        return batch.positions_M, self.head(self.model, batch, self._hidden(batch.tokens_BT))

    def _filled(self, group: Windows) -> Windows:
        missing = self.batch_windows - len(group)
        if self.tokens_N1.device.type != "cuda" or not missing:
            return group
        nothing = torch.zeros(missing, dtype=torch.int64)
        return Windows(*(torch.cat([column, nothing]) for column in (group.start, group.first, group.length)))

    def learn(self, chunk: int) -> None:
        """Nothing."""

    def state(self) -> State:
        """Nothing."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing."""


def stream_windows(section: str, model: GPT, targets: int, *, stride: int, as_published: bool) -> Windows:
    """The windows of a stream. Raises UserError if their stride, a key of `section`, would leave gaps."""
    seq_len = model.config.seq_len
    if stride > seq_len:
        raise UserError(f"params.yaml: {section}.stride ({stride}) exceeds the model's seq_len ({seq_len})")
    return (published if as_published else scored_once)(targets, seq_len=seq_len, stride=stride)


def in_chunks(windows: Windows, batch_windows: int) -> list[Windows]:
    """Runs of whole batches, as many as there may be resume points: chunks for evaluators that need none."""
    batches = -(-len(windows) // batch_windows)
    return in_groups(windows, batch_windows * -(-batches // POINTS))
