"""Other tokens in the place of some, and whether predictions that must not know of it have changed.

C1, causality: whatever comes later, earlier predictions and the next one stay as they are.

At some cuts everything that is not yet known is replaced: inside the first batch, at its edge, and behind the first
step of learning. (The decoder of decoder.py cuts behind every single token of its slice.)

C3, score before update: what a target is scored with has not been fitted on it.

Single tokens are replaced, in the middle and at the beginning of the first chunk that is learned from. The prediction
of the token itself must stay, and all before it. An evaluator that trains first and scores then moves.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.certification.accounting import Finding
from fairway.certification.black_box import Baseline, BlackBox
from fairway.certification.coding_order import Order, stream_order, visiting_order
from fairway.tokens.tokenizer import BOS


@dataclass(frozen=True)
class Change:
    """A prediction that changed: its position and by how much, in nats; None where the order of predictions did."""

    position: int
    nats: float | None


def replaced(tokens_N1: Tensor, which_N1: Tensor, vocab_size: int, seed: int) -> Tensor:
    """The stream with other random tokens in the marked places (bool, on the CPU). None of them starts a document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens_N1.cpu()
    others = (tokens + torch.randint(1, vocab_size, tokens.shape, generator=generator)) % vocab_size
    # The one behind it, or behind that: still another one than was there.
    others = torch.where(others == BOS, torch.where(tokens == BOS + 1, BOS + 2, BOS + 1), others)
    return torch.where(which_N1, others, tokens).to(tokens_N1.device)


def first_change(box: BlackBox, baseline: Baseline, tokens_N1: Tensor, protected_N: Tensor) -> Change | None:
    """Run a pass over a disturbed stream until all protected positions (N,) bool are predicted; the first difference.

    The layout has to be the same too: the same targets, batch by batch.
    """
    left, done = int(protected_N.sum()), 0
    for event in box.events(tokens_N1):
        span = slice(done, done + len(event.positions_M))
        done = span.stop
        expected = baseline.positions_E[span]
        if not torch.equal(event.positions_M, expected):
            return Change(int(event.positions_M[0]), None)
        rows_M = protected_N[expected] & baseline.first_E[span]
        difference = (event.log_probs_MV - baseline.log_probs_NV[expected]).abs().amax(1)
        # Not "larger": a difference may be no number.
        changed_M = rows_M & ~(difference <= baseline.noise_nats)
        if changed_M.any():
            return Change(int(expected[changed_M][0]), float(difference[changed_M].max()))
        left -= int(rows_M.sum())
        if not left:
            break
    return None


def causality(box: BlackBox, baseline: Baseline) -> tuple[Finding, Order]:
    """The finding, and the order in which the evaluator is causal, or that of the stream if it is so in none."""
    order = stream_order(baseline)
    cuts, change = _search(box, baseline, order)
    evidence: dict[str, Any] = {"cuts": cuts, "noise_nats": baseline.noise_nats, "order": order.name}
    if change is None:
        return Finding("pass", f"nothing moved when all later tokens were replaced, at {cuts} cuts", evidence), order
    visits = visiting_order(baseline)
    # Only who visits in another order, or depends on where documents start, can be causal in it.
    if change.nats is None or not torch.equal(visits.positions, order.positions):
        cuts, in_visits = _search(box, baseline, visits)
        if in_visits is None:
            given = int(visits.given_N1[1:].sum())
            evidence = {"cuts": cuts, "noise_nats": baseline.noise_nats, "order": "visits", "given_tokens": given}
            why = f"nothing moved when all tokens visited later were replaced, but for {given} that it must be given"
            return Finding("pass", f"{why} (document starts)", evidence), visits
    evidence |= {"changed_target": change.position + 1, "change_nats": change.nats}
    if change.nats is None:
        return Finding("fail", "replacing later tokens changed the order of the predictions", evidence), order
    why = f"replacing later tokens moved the prediction of token {change.position + 1} by {change.nats:.2g} nats"
    return Finding("fail", why, evidence), order


def _search(box: BlackBox, baseline: Baseline, order: Order) -> tuple[int, Change | None]:
    """The number of cuts tried, and the first change if there was one: a single one decides."""
    for number, index in enumerate(cuts(baseline, order), start=1):
        unknown_N1 = order.unknown(index)
        tokens = replaced(baseline.tokens_N1, unknown_N1, box.model.config.vocab_size, seed=number)
        change = first_change(box, baseline, tokens, order.known_targets(index))
        if change is not None:
            return number, change
    return number, None


def cuts(baseline: Baseline, order: Order) -> list[int]:
    """Indices of the order: one in the first batch, its last one, and one behind the first step of learning."""
    batch, learned, N = baseline.batch_N[order.positions], order.learned_from(baseline), len(order.positions)
    first_batch = int((batch == batch[0]).sum())
    generator = torch.Generator().manual_seed(1)

    def within(begin: int, end: int, count: int) -> list[int]:
        return torch.randint(begin, end, (count,), generator=generator).tolist() if begin < end else []

    inside = {*within(0, first_batch, 1), first_batch - 1}
    return sorted({*inside, *within(learned, N, 1)})


def score_first(box: BlackBox, baseline: Baseline, order: Order) -> Finding:
    """The finding."""
    chunk = order.learned_from(baseline)
    evidence: dict[str, Any] = {"targets": 0, "noise_nats": baseline.noise_nats, "updates": int(baseline.chunk_N.max())}
    for index in _ungiven(order, [chunk // 2, 0]):
        evidence["targets"] += 1
        which_N1 = torch.zeros_like(order.given_N1)
        which_N1[order.positions[index] + 1] = True
        tokens = replaced(baseline.tokens_N1, which_N1, box.model.config.vocab_size, seed=index)
        change = first_change(box, baseline, tokens, order.known_targets(index))
        if change is not None:
            target = int(order.positions[index]) + 1
            evidence |= {"changed_target": change.position + 1, "change_nats": change.nats, "replaced": target}
            return Finding("fail", f"what token {target} is moved the predictions up to its own", evidence)
    why = "no prediction depended on the token it predicts, whatever was learned from that token afterwards"
    return Finding("pass", why, evidence)


def _ungiven(order: Order, indices: list[int]) -> list[int]:
    """For each index the nearest one before it whose token is not given beforehand."""
    free = (~order.given_N1[order.positions + 1]).nonzero()[:, 0]
    return list(dict.fromkeys(int(free[(free <= index).sum().clamp(min=1) - 1]) for index in indices))
