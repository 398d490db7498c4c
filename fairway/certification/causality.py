"""The first and the third condition: later tokens decide nothing, and a token is not learned from before it is scored.

C1, causality: whatever comes later, earlier predictions and the next one stay as they are. At some cuts everything that
is not yet known is replaced: inside the first batch, at its edge, and behind each step of learning. Compared are the
last predictions before the cut. (The decoder of decoder.py cuts behind every single token that it decodes.) Document
starts stay where they are, since with them the layout of batches may change, and with the batches the rounding. Only at
one more cut, before such a start, these are replaced too; there an evaluator may predict in other batches, as long as
it predicts the same up to rounding. Rounding could hide a use of later document starts and of nothing else: the cuts
before have shown that not a bit moves with any other token. And the decoder of decoder.py does not know those starts.

C3, score before update: what a target is scored with has not been fitted on it. Single tokens are replaced, in the
first chunk and behind each step of learning. The prediction of the token itself must stay, and those before it. An
evaluator that trains first and scores then moves.

A disturbed pass is compared with the undisturbed one at chosen positions. It computes no more than that needs: batches
without such a position may be left out, and it may begin in the state that the undisturbed pass was in behind a chunk.
That hides nothing: for C1 it still learns from the last chunk before the cut itself, and that what it had learned
before knows of no later token was seen at the cut before. For C3 it is the token's own chunk that must not have been
learned from.

Legend: N targets, M targets predicted together, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.certification.accounting import Finding, order_bits
from fairway.certification.black_box import Baseline, BlackBox, Event, Layout
from fairway.certification.excerpt import Order, stream_order, visiting_order
from fairway.tokens.tokenizer import BOS

# A prediction that is computed in another batch may differ by so many nats, by rounding alone, on the average token of
# its own distribution: with bfloat16, logits of 8 to 16 are a sixteenth apart. Single tokens that are as good as
# impossible move by more where adapters have learned, since their steps have one size however small a gradient is.
ROUNDING_NATS = {torch.bfloat16: 0.2, torch.float32: 1e-3}


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
    allowed_nats = max(base.noise_nats, ROUNDING_NATS[box.model.compute_dtype]) if other_batches else base.noise_nats
    for event in box.events(tokens_N1, wanted=compared_N, first_chunk=first_chunk, state=state):
        first_M = torch.ones_like(event.positions_M, dtype=torch.bool)
        if not other_batches:
            layout = _same_layout(layouts, event, compared_N)
            if layout is None:
                return Change(int(event.positions_M[0]), None)
            first_M = layout.first_M
        compared_M = compared_N[event.positions_M] & first_M
        change = _change(base, event, compared_M, allowed_nats, on_average=other_batches)
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


def _change(
    base: Baseline, event: Event, compared_M: Tensor, allowed_nats: float, *, on_average: bool
) -> Change | None:
    """The first change among the compared positions (M,) bool of an event.

    A prediction changes by what the token does that changes most, or `on_average` by what the average token does.
    """
    positions, device = event.positions_M[compared_M], event.log_probs_MV.device
    if not len(positions):
        return None
    before_MV = base.log_probs_NV[positions.to(device)]
    difference_MV = (event.log_probs_MV[compared_M.to(device)] - before_MV).abs()
    nats_M = ((before_MV.exp() * difference_MV).sum(1) if on_average else difference_MV.amax(1)).cpu()
    # Not "larger than allowed": a difference may be no number.
    changed = ~(nats_M <= allowed_nats)
    return Change(int(positions[changed][0]), float(nats_M[changed].max())) if changed.any() else None


# So many predictions up to a cut, or to a replaced token, are compared.
COMPARED = 256
# The cut behind a step of learning is at most so many targets behind it.
BEHIND = 64


def causality(box: BlackBox, base: Baseline, documents: int) -> tuple[Finding, Order]:
    """The finding, and the order in which the evaluator is causal, or that of the stream if it is so in none.

    `documents` is the number of documents of the whole validation stream.
    """
    order = stream_order(base)
    cuts, change = _search(box, base, order)
    evidence: dict[str, Any] = {"cuts": cuts, "noise_nats": base.noise_nats, "order": order.name}
    if change is None:
        return Finding("pass", f"nothing moved when all later tokens were replaced, at {cuts} cuts", evidence), order
    visits = visiting_order(base)
    in_visits, in_visits_change = _search(box, base, visits)
    if in_visits_change is None:
        why = (
            f"nothing moved when all tokens that it visits later were replaced, at {in_visits} cuts, as long as "
            "documents start where they do; it is not causal for a decoder that does not know where they will start"
        )
        return Finding("pass", why, evidence | {"cuts": in_visits, "order": visits.name}), visits
    evidence |= {"changed_target": change.position + 1, "change_nats": change.nats}
    return Finding("fail", _moved(change, in_visits_change, documents), evidence), order


def _moved(change: Change, in_visits: Change, documents: int) -> str:
    if in_visits.nats is None:
        return (
            "replacing later tokens changed the order of the predictions, which a decoder cannot know; to tell it an "
            f"order of the {documents:,} documents takes {order_bits(documents):,.0f} bits"
        )
    # In the order of the stream it may be the layout that changed first.
    moved = in_visits if change.nats is None else change
    return f"replacing later tokens moved the prediction of token {moved.position + 1} by {moved.nats:.2g} nats"


def _search(box: BlackBox, base: Baseline, order: Order) -> tuple[int, Change | None]:
    """The number of cuts tried, and the first change if there was one: a single one decides."""
    tried = 0
    for change in _changes(box, base, order):
        tried += 1
        if change is not None:
            return tried, change
    return tried, None


def _changes(box: BlackBox, base: Baseline, order: Order) -> Iterator[Change | None]:
    """What changed at each cut."""
    vocab_size, starts_N1 = box.model.config.vocab_size, base.tokens_N1.cpu() == BOS
    chunk_I = base.chunk_N[order.positions]
    for index in cuts(base, order):
        tokens = replaced(base.tokens_N1, order.unknown(index) & ~starts_N1, vocab_size, seed=index)
        # The last chunk of which no target is replaced is still to be learned from.
        first_chunk = min(max(int(chunk_I[index:].min()) - 1, 0), len(base.states))
        yield first_change(box, base, tokens, order.up_to(index, COMPARED), first_chunk=first_chunk)
    unknown_starts = (starts_N1 & ~order.given_N1)[order.positions + 1].nonzero()[:, 0].tolist()
    for index in unknown_starts[:1]:
        tokens = replaced(base.tokens_N1, order.unknown(index), vocab_size, seed=index)
        yield first_change(box, base, tokens, order.up_to(index, COMPARED), other_batches=order.name == "stream")


def cuts(base: Baseline, order: Order) -> list[int]:
    """Indices of the order, ascending: one in the first batch, one at its end, and one behind each step of learning."""
    batch_I = base.batch_N[order.positions]
    first_batch = int((batch_I == batch_I[0]).sum())
    inside = int(torch.randint(0, first_batch, (1,), generator=torch.Generator().manual_seed(1)))
    return sorted({inside, first_batch - 1, *behind(base, order)})


def behind(base: Baseline, order: Order) -> list[int]:
    """An index shortly behind each step of learning."""
    return [min(edge + BEHIND, len(order.positions) - 1) for edge in order.edges(base)]


def score_first(box: BlackBox, base: Baseline, order: Order) -> Finding:
    """The finding."""
    chunk_I = base.chunk_N[order.positions]
    middle = [*order.edges(base), len(order.positions)][0] // 2
    evidence: dict[str, Any] = {"targets": 0, "noise_nats": base.noise_nats}
    for index in _ungiven(order, [0, middle, *behind(base, order)]):
        evidence["targets"] += 1
        which_N1 = torch.zeros_like(order.given_N1)
        which_N1[order.positions[index] + 1] = True
        tokens = replaced(base.tokens_N1, which_N1, box.model.config.vocab_size, seed=index)
        first_chunk = min(int(chunk_I[index]), len(base.states))
        change = first_change(box, base, tokens, order.up_to(index, COMPARED), first_chunk=first_chunk)
        if change is not None:
            target = int(order.positions[index]) + 1
            evidence |= {"changed_target": change.position + 1, "change_nats": change.nats, "replaced": target}
            return Finding("fail", f"replacing token {target} alone moved the predictions up to its own", evidence)
    why = "no prediction depended on the token it predicts, whatever was learned from that token afterwards"
    return Finding("pass", why, evidence)


def _ungiven(order: Order, indices: list[int]) -> list[int]:
    """For each index the nearest one before it whose token is not given beforehand."""
    free = (~order.given_N1[order.positions + 1]).nonzero()[:, 0]
    return list(dict.fromkeys(int(free[(free <= index).sum().clamp(min=1) - 1]) for index in indices))
