"""SLOT: an offset to the final hidden state, fitted on some tokens before others are scored with it.

What an offset is fitted on decides what the score means (settings.fitted_on):

    batch     one offset for a batch of windows, on all their places but the last (PR #1150, #1172)
    scored    one per window, on exactly the places then scored (PR #1488, after #1313)
    context   one per window, on the places before those (meant by PR #1306, #1333, which shared it within a batch)

The first two fit on the targets that they then score: their figure is not a code length. They are here because the
records used them. The third is causal, and so is `carried` (evaluation/slot_carried.py).
Source: arXiv:2505.12392 and the pull requests above. The originals with one offset a batch rounded h + δ and the
softcap to bfloat16, which moves digits by about 1e-4 nats.

Legend: B windows, T tokens of a window, X its last places that are looked at, G groups, P fitted places of a group, M
scored places, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.passes import Pass
from fairway.evaluation.scoring import Batch, WindowPass, in_chunks, stream_windows
from fairway.evaluation.slot_carried import CarriedPass
from fairway.evaluation.slot_offsets import Offsets, SlotFitSettings, SlotSettings, gradient, products, step_lr
from fairway.evaluation.windows import Windows
from fairway.model.backends import compiled_on_gpu
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World


@dataclass(frozen=True)
class SlotEvaluator(Evaluator):
    """Windows as in sliding evaluation, with offsets."""

    settings: SlotSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A carried offset learns between chunks; any other lives within a batch."""
        s = self.settings
        return FORMS[s.form](model, tokens_N1, stream_windows(model, tokens_N1, s), world, s)


def passing_offsets(model: GPT, tokens_N1: Tensor, windows: Windows, world: World, s: SlotSettings) -> Pass:
    """A pass with offsets that are fitted anew for every batch of windows of the stream."""
    chunks = in_chunks(windows, s.batch_windows)
    head, width = OffsetHead(s, tokens_N1.device), s.stride if s.fitted_on == "scored" else None
    return WindowPass(model, tokens_N1, chunks, world, batch_windows=s.batch_windows, head=head, width=width)


def document_offsets(model: GPT, tokens_N1: Tensor, windows: Windows, world: World, s: SlotSettings) -> Pass:
    """A pass with an offset for each window within a document, fitted on its places before the scored ones."""
    full = s.batch_windows * (model.config.seq_len - s.stride)

    def places(batch: Batch) -> Places:
        # How much context the other windows of the batch have would tell where later documents start.
        found = context_places(batch)
        return Places(found.rows_GP, (found.weight_GP > 0) / full)

    head, chunks = OffsetHead(s, tokens_N1.device, places), in_chunks(windows, s.batch_windows, s.stretch)
    return WindowPass(model, tokens_N1, chunks, world, batch_windows=s.batch_windows, head=head, stretch=s.stretch)


# Passes by SlotSettings.form. A table, so that the program that ships carries the one that its record uses.
FORMS: dict[str, Callable[[GPT, Tensor, Windows, World, SlotSettings], Pass]] = {
    "carried": CarriedPass,
    "documents": document_offsets,
    "stream": passing_offsets,
}


@dataclass(frozen=True)
class Places:
    """What offsets are fitted on: per group, places as rows of (B·X), with weights that sum to 1 over everything."""

    rows_GP: Tensor
    weight_GP: Tensor


def batch_places(batch: Batch) -> Places:
    """One group: all places but each window's last.

    Places beyond the stream count too, with target 0, as in the records; windows that fill up a batch do not.
    """
    B, T = batch.tokens_BT.shape
    rows_BT = torch.arange(B * T, device=batch.tokens_BT.device).view(B, T)[:, :-1]
    real_BT = (batch.length_B > 0)[:, None].expand_as(rows_BT)
    return _weighted(rows_BT.reshape(1, -1), real_BT.reshape(1, -1))


def scored_places(batch: Batch) -> Places:
    """One group per window: the places that it scores."""
    longest = int((batch.windows.length - batch.windows.first).max())
    return _runs(batch, batch.first_B, batch.length_B, longest)


def context_places(batch: Batch) -> Places:
    """One group per window: the places before those that it scores."""
    return _runs(batch, torch.zeros_like(batch.first_B), batch.first_B, int(batch.windows.first.max()))


def _runs(batch: Batch, begin_B: Tensor, end_B: Tensor, longest: int) -> Places:
    """One group per window: its offsets from begin to end; rows padded with weight 0."""
    (B, X), T = batch.targets_BX.shape, batch.tokens_BT.size(1)
    offset_BP = begin_B[:, None] + torch.arange(max(longest, 1), device=begin_B.device)
    inside_BP = offset_BP < end_B[:, None]
    # Of offset 0, which may not be there.
    first_row_B = torch.arange(0, B * X, X, device=begin_B.device) - (T - X)
    return _weighted((first_row_B[:, None] + offset_BP) * inside_BP, inside_BP)


def _weighted(rows_GP: Tensor, counted_GP: Tensor) -> Places:
    """Equal weights wherever a place counts: the loss is a mean over the batch, whatever its groups.

    Windows with offsets of their own are then still coupled by the optimizer's eps, which is not scale-free.
    """
    return Places(rows_GP, counted_GP / counted_GP.sum().clamp(min=1))


FITTED_ON: dict[str, Callable[[Batch], Places]] = {
    "batch": batch_places,
    "scored": scored_places,
    "context": context_places,
}


class OffsetHead:
    """The head that fits offsets for a batch from zero, and scores with them.

    `places` says what they are fitted on; None means what settings.fitted_on says.
    """

    def __init__(
        self, settings: SlotFitSettings, device: torch.device, places: Callable[[Batch], Places] | None = None
    ) -> None:
        self.settings, self.places = settings, places or FITTED_ON[settings.fitted_on]
        self._gradient = compiled_on_gpu(gradient, device)

    def __call__(self, model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
        """Logits (M, V) float32 of the scored places."""
        a_GV = self.fit(model, batch, hid_BXD).logit_shift(model)
        group_M = batch.rows_M // hid_BXD.size(1) if len(a_GV) > 1 else torch.zeros_like(batch.rows_M)
        return softcap(products(hid_BXD.flatten(0, 1)[batch.rows_M], model) + a_GV[group_M], model.config.softcap)

    def fit(self, model: GPT, batch: Batch, hid_BXD: Tensor) -> Offsets:
        """The offsets of the batch's groups."""
        places = self.places(batch)
        U_GPV = products(hid_BXD.flatten(0, 1)[places.rows_GP], model)
        targets_GP = batch.targets_BX.flatten()[places.rows_GP]
        offsets = Offsets(model, len(targets_GP), self.settings)
        for step in range(self.settings.steps):
            a_GV = offsets.logit_shift(model)
            gamma_GV = self._gradient(U_GPV, a_GV, targets_GP, places.weight_GP, model.config.softcap)
            offsets.step(model, gamma_GV, step_lr(self.settings, step))
        return offsets
