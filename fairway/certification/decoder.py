"""The test that decides: slices of the stream are coded, and decoded again from the artifact and the code alone.

The encoder has the whole stream. The decoder has a network loaded anew, the tokens before each slice, and a stream
whose other tokens are all the same until it has decoded them. What an evaluator cannot predict without having seen it
comes out as another distribution, and from there on as other tokens. The code must also be as long as what was claimed
for the slices, neither longer nor shorter: otherwise what is coded is not what was claimed. The slices lie around the
first two steps of learning and the start of a document, as far as there are any.

What turns tokens into bits and bits into tokens stands in decoding/token_coder.py.

Legend: N targets, C coded targets, V vocabulary, W words of code.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairway.certification.accounting import Finding, places_bits
from fairway.certification.black_box import Baseline, BlackBox, baseline
from fairway.certification.excerpt import Order, stream_order
from fairway.certification.follower import Follower
from fairway.certification.stepping import NotPredicted
from fairway.decoding.token_coder import Decoder, Encoder, NoCode
from fairway.tokens.tokenizer import BOS

# The token that stands in the decoder's stream wherever the true one is not known yet.
UNKNOWN = 0
# The length of a code may differ from the claim by so many bits, which its last words leave unused, and by this share
# of the claim, for the rounding of probabilities to counts and of activations computed in other batches.
SLACK_BITS, SLACK_SHARE = 64, 1e-3
# Targets that the price of an honest code is estimated on.
PRICED = 16


@dataclass(frozen=True)
class Slices:
    """What is coded: indices (C,) of an order, ascending, and the order itself."""

    order: Order
    indices: Tensor

    @property
    def positions(self) -> Tensor:
        """The coded positions (C,), one behind the other."""
        return self.order.positions[self.indices]

    def asked(self) -> Tensor:
        """The same as a mask (N,) bool."""
        asked_N = torch.zeros(len(self.order.positions), dtype=torch.bool)
        asked_N[self.positions] = True
        return asked_N


def decoder(
    box: BlackBox, fresh: BlackBox, base: Baseline, slices: Slices, short_N1: Tensor, decoded: Callable[[int], None]
) -> Finding:
    """The finding. `fresh` has the artifact loaded anew; `decoded` is told of each token that came back.

    `short_N1`, the shortest beginning of the stream that will do, serves to price an evaluator that fails.
    """
    coded, order = slices.positions, slices.order
    words = _encode(box, base, slices)
    right = _right(_decode(fresh, base, slices, words), base.tokens_N1[coded + 1].tolist(), decoded)
    claimed_bits = float(base.claims_N[coded].sum()) / math.log(2)
    excess_bits = 32 * len(words) - claimed_bits
    starts, others = order.given_starts(base), order.given_others(base)
    evidence = {
        "tokens": len(coded),
        "first": int(coded[0]) + 1,
        "chunk_ends": int(base.chunk_N[coded].max()),
        "decoded": right,
        "claimed_bytes": round(claimed_bits / 8, 1),
        "compressed_bytes": 4 * len(words),
        "given_starts": starts,
        "given_others": others,
        "given_bits": round(places_bits(len(order.positions), starts)),
    }
    if right < len(coded):
        evidence |= {"diverges_at": int(coded[right]) + 1} | _honest_price(box, short_N1)
        why = f"decoding goes wrong at token {evidence['diverges_at']}"
        if evidence["priced_targets"]:
            more = (evidence["honest_nats"] - evidence["claimed_nats"]) / math.log(2)
            why += f"; an honest code, or what was fitted beside it, takes {more:.3f} bits a token more than claimed"
        return Finding("fail", why, evidence)
    if not abs(excess_bits) <= SLACK_BITS + SLACK_SHARE * claimed_bits:
        evidence |= _honest_price(box, short_N1)
        than_claimed = f"{abs(excess_bits):.0f} bits {'longer' if excess_bits > 0 else 'shorter'} than claimed"
        return Finding("fail", f"it decodes, but the code is {than_claimed}", evidence)
    if others:
        return Finding("fail", f"it decodes, but only if {others} tokens of the text itself are given before", evidence)
    told = f", to a decoder that is told where the other {starts:,} documents tried start" if starts else ""
    return Finding("pass", f"{right} tokens came back from the artifact and a code as long as claimed{told}", evidence)


def _right(found: Iterator[int], expected: list[int], decoded: Callable[[int], None]) -> int:
    """How many tokens came back before the first wrong or missing one; `decoded` is told of each."""
    right = 0
    for token, true in zip(found, expected, strict=False):
        if token != true:
            break
        right += 1
        decoded(1)
    return right


def choose_slices(base: Baseline, order: Order, tokens: int) -> Slices:
    """So many targets, those nearest to the first two steps of learning.

    If no document starts among them, the first start of one counts like a step. Without any of these they lie in the
    middle.
    """
    edges, N = order.edges(base), len(order.positions)
    starts = (base.tokens_N1.cpu()[order.positions] == BOS) & (order.positions > 0)
    if bool(starts.any()) and not (edges and bool(starts[_nearest(edges, N, tokens)].any())):
        edges = [*edges, int(starts.nonzero()[0])]
    return Slices(order, _nearest(edges or [N // 2], N, tokens))


def _nearest(places: list[int], total: int, count: int) -> Tensor:
    """The `count` numbers of 0 ... total - 1 that are nearest to some of the places, ascending."""
    distance = (torch.arange(total)[:, None] - torch.tensor(places)).abs().amin(1)
    return distance.argsort(stable=True)[:count].sort().values


def _encode(box: BlackBox, base: Baseline, slices: Slices) -> np.ndarray:
    """The code of the targets, (W,) uint32.

    It is made of predictions computed as the decoder computes them, but by somebody who knows the stream. Where these
    are those of an ordinary pass, they are not computed again.
    """
    follower, encoder = Follower(box, base, base.tokens_N1, slices.asked(), base.states), Encoder()
    rows: dict[int, Tensor] = {}
    for position in slices.positions.tolist():
        if follower.exact:
            rows = {position: base.log_probs_NV[position].cpu()}
        elif position not in rows:
            rows = follower.rows(position)
        encoder.push(base.tokens_N1[position + 1][None].cpu().numpy(), rows[position][None])
    return encoder.words()


def _decode(box: BlackBox, base: Baseline, slices: Slices, words: np.ndarray) -> Iterator[int]:
    """The tokens, one by one. The pass knows each of them from then on; those between slices it is given.

    They end where the pass, as it knows the stream by then, does not predict the next one in its chunk at all, and
    where the words are no code by what it predicts.
    """
    order, true_N1 = slices.order, base.tokens_N1
    unknown_N1 = order.unknown(int(slices.indices[0])).to(true_N1.device)
    follower = Follower(box, base, torch.where(unknown_N1, UNKNOWN, true_N1), slices.asked())
    reader, expected = Decoder(words), int(slices.indices[0])
    for index in slices.indices.tolist():
        if index > expected:
            known_N1 = ~order.unknown(index).to(true_N1.device)
            follower.fill(known_N1, true_N1[known_N1])
        position, expected = int(order.positions[index]), index + 1
        try:
            token = int(reader.pop(follower.row(position)[None])[0])
        except (NotPredicted, NoCode):
            return
        follower.fill(position + 1, torch.tensor(token, device=true_N1.device))
        yield token


def _honest_price(box: BlackBox, tokens_N1: Tensor) -> dict[str, float]:
    """Nats per token, claimed and as predicted without what comes later, of targets in the second half of a stream.

    Those that cannot be predicted so have no price. If that is all of them, their number, 0, is all that is known.
    """
    base = baseline(box, tokens_N1)
    order, N = stream_order(base), len(base.times_N)
    chosen = torch.linspace(N // 2, N - 1, PRICED).long().unique().tolist()
    honest = {position: _honest_nats(box, base, order, position) for position in chosen}
    priced = {position: nats for position, nats in honest.items() if math.isfinite(nats)}
    if not priced:
        return {"priced_targets": 0}
    claimed, price = base.claims_N[list(priced)], torch.tensor(list(priced.values()), dtype=torch.float64)
    return {
        "priced_targets": len(priced),
        "claimed_nats": float(claimed.mean()),
        "honest_nats": float(price.mean()),
        "price_standard_error": float((price - claimed).std() / len(priced) ** 0.5),
    }


def _honest_nats(box: BlackBox, base: Baseline, order: Order, position: int) -> float:
    """Nats of a target, predicted without what comes later; NaN if it is not predicted then."""
    tokens_N1 = base.tokens_N1
    buffer_N1 = torch.where(order.unknown(position).to(tokens_N1.device), UNKNOWN, tokens_N1)
    try:
        row_V = Follower(box, base, buffer_N1, order.up_to(position, 1)).row(position)
    except NotPredicted:
        return math.nan
    return -float(row_V[int(tokens_N1[position + 1])])
