"""Other tokens in the place of some, and whether predictions that must not know of it have changed.

A disturbed pass is compared with the undisturbed one at chosen positions. It computes no more than that needs: batches
without such a position may be left out, and it may begin in the state that the undisturbed pass was in behind a chunk.

Legend: N targets, M targets predicted together, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.certification.black_box import Baseline, BlackBox, Event, Layout
from fairway.tokens.tokenizer import BOS

# A prediction that is computed in another batch may differ by so many nats, by rounding alone: with bfloat16, logits of
# 8 to 16 are a sixteenth apart.
ROUNDING_NATS = 0.2


@dataclass(frozen=True)
class Change:
    """A prediction that changed: its position and by how much, in nats; None where it was made in another order."""

    position: int
    nats: float | None


def replaced(tokens_N1: Tensor, which_N1: Tensor, vocab_size: int, seed: int) -> Tensor:
    """The stream with other random tokens in the marked places (bool, on the CPU). None of them starts a document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens_N1.cpu()
    others = (tokens + torch.randint(1, vocab_size, tokens.shape, generator=generator)) % vocab_size
    # Where that is the start of a document, the token behind it or the next one is taken: still not what was there.
    others = torch.where(others == BOS, torch.where(tokens == BOS + 1, BOS + 2, BOS + 1), others)
    return torch.where(which_N1, others, tokens).to(tokens_N1.device)


def first_change(
    box: BlackBox,
    base: Baseline,
    tokens_N1: Tensor,
    compared_N: Tensor,
    *,
    first_chunk: int = 0,
    other_batches: bool = False,
) -> Change | None:
    """Run a pass over a disturbed stream until all compared positions (N,) bool are predicted; the first difference.

    With `first_chunk` it begins there, in the state of the undisturbed pass, and nothing before is compared. The
    batches must be the same, and their predictions up to the noise, unless `other_batches` are allowed.
    """
    compared_N = compared_N & (base.chunk_N >= first_chunk)
    left = int(compared_N.sum())
    layouts = iter([layout for layout in base.batches if layout.chunk >= first_chunk])
    state = base.states[first_chunk - 1] if first_chunk else None
    allowed_nats = max(base.noise_nats, ROUNDING_NATS) if other_batches else base.noise_nats
    for event in box.events(tokens_N1, wanted=compared_N, first_chunk=first_chunk, state=state):
        first_M = torch.ones_like(event.positions_M, dtype=torch.bool)
        if not other_batches:
            layout = _same_layout(layouts, event, compared_N)
            if layout is None:
                return Change(int(event.positions_M[0]), None)
            first_M = layout.first_M
        compared_M = compared_N[event.positions_M] & first_M
        change = _change(base, event, compared_M, allowed_nats)
        if change is not None:
            return change
        left -= int(compared_M.sum())
        if left <= 0:
            break
    return None


def _same_layout(layouts: Iterator[Layout], event: Event, compared_N: Tensor) -> Layout | None:
    """The undisturbed pass's batch of the same positions, or None if there is none.

    Batches before it that are compared nowhere have been left out.
    """
    for layout in layouts:
        if torch.equal(layout.positions_M, event.positions_M):
            return layout
        if bool(compared_N[layout.positions_M].any()):
            break
    return None


def _change(base: Baseline, event: Event, compared_M: Tensor, allowed_nats: float) -> Change | None:
    """The first change among the compared positions (M,) bool of an event."""
    positions, device = event.positions_M[compared_M], event.log_probs_MV.device
    if not len(positions):
        return None
    difference = event.log_probs_MV[compared_M.to(device)] - base.log_probs_NV[positions.to(device)]
    largest = difference.abs().amax(1).cpu()
    # Not "larger than allowed": a difference may be no number.
    changed = ~(largest <= allowed_nats)
    return Change(int(positions[changed][0]), float(largest[changed].max())) if changed.any() else None
