"""The test that decides: a slice of the stream is coded, and decoded again from the artifact and the code alone.

The encoder has the whole stream. The decoder has a network loaded anew, the tokens before the slice, and a stream whose
other tokens are all the same until it has decoded them. What an evaluator cannot predict without having seen it comes
out as another distribution, and from there on as other tokens. The code must also be as long as what was claimed for
the slice, neither longer nor shorter: otherwise what is coded is not what was claimed. The slice lies around the first
step of learning, if there is one.

Tokens become bits, and bits tokens, by range coding with integer counts (Martin 1979), from the constriction library.

Legend: N targets, V vocabulary, W words of code.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from fairway.certification.accounting import Finding
from fairway.certification.black_box import Baseline, BlackBox, baseline
from fairway.certification.coding_order import Order, stream_order
from fairway.certification.stepping import Follower

# Counts of a distribution add up to 2 to this power, the precision of the library's coder.
PRECISION = 24


def counts(log_probs_V: Tensor) -> np.ndarray:
    """A distribution as integers (V,), each at least 1, that sum to 2**PRECISION; what is left goes to the largest."""
    probs_V = np.exp(log_probs_V.double().numpy())
    counts_V = 1 + np.floor(probs_V / probs_V.sum() * (2**PRECISION - len(probs_V))).astype(np.int64)
    counts_V[counts_V.argmax()] += 2**PRECISION - counts_V.sum()
    return counts_V


def _model(log_probs_V: Tensor) -> Any:
    return constriction.stream.model.Categorical(counts(log_probs_V).astype(np.float64), lazy=True)


class Encoder:
    """Takes tokens; `words` are the code so far, (W,) uint32."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def push(self, token: int, log_probs_V: Tensor) -> None:
        """Code a token of a distribution (V,)."""
        self._coder.encode(token, _model(log_probs_V))

    def words(self) -> np.ndarray:
        """The code."""
        code: np.ndarray = self._coder.get_compressed()
        return code


class Decoder:
    """Gives the tokens back, if it is given the same distributions."""

    def __init__(self, words: np.ndarray) -> None:
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def pop(self, log_probs_V: Tensor) -> int:
        """The next token."""
        return int(self._coder.decode(_model(log_probs_V)))


# The token that stands in the decoder's stream wherever the true one is not known yet.
UNKNOWN = 0
# The length of a code may differ from the claim by so many bits, which its last words leave unused, and by this share
# of the claim, for the rounding of probabilities to counts and of activations computed in other batches.
SLACK_BITS, SLACK_SHARE = 64, 1e-3
# Of all tokens, those that are given beforehand.
MOST_GIVEN = 0.01
# Targets that the price of an honest code is estimated on.
PRICED = 16


def decoder(
    box: BlackBox,
    fresh: BlackBox,
    base: Baseline,
    order: Order,
    short_N1: Tensor,
    *,
    tokens: int,
    decoded: Callable[[int], None],
) -> Finding:
    """The finding for a slice of so many tokens. `fresh` has the artifact loaded anew; `decoded` is told of each token.

    `short_N1`, the shortest beginning of the stream that will do, serves to price an evaluator that fails.
    """
    span = slice_around(order.learned_from(base), len(order.positions), tokens)
    coded = order.positions[span.start : span.stop]
    words = _encode(box, base, coded)
    right = _right(_decode(fresh, base, order, span, words), base.tokens_N1[coded + 1].tolist(), decoded)
    claimed_bits = float(base.claims_N[coded].sum()) / math.log(2)
    excess_bits = 32 * len(words) - claimed_bits
    evidence = {
        "tokens": len(span),
        "first": int(coded[0]) + 1,
        "updates": int(base.chunk_N[coded].max()),
        "decoded": right,
        "claimed_bytes": round(claimed_bits / 8, 1),
        "compressed_bytes": 4 * len(words),
        "given_tokens": int(order.given_N1[1:].sum()),
        "given_bytes": round(order.given_bits(box.model.config.vocab_size) / 8, 1),
    }
    if right < len(span):
        evidence |= {"diverges_at": int(coded[right]) + 1} | _honest_price(box, short_N1)
        more = (evidence["honest_nats"] - evidence["claimed_nats"]) / math.log(2)
        why = f"decoding goes wrong at token {evidence['diverges_at']}; an honest code, or what was fitted beside it,"
        return Finding("fail", f"{why} takes {more:.3f} bits a token more than claimed", evidence)
    if not abs(excess_bits) <= SLACK_BITS + SLACK_SHARE * claimed_bits:
        evidence |= _honest_price(box, short_N1)
        than_claimed = f"{abs(excess_bits):.0f} bits {'longer' if excess_bits > 0 else 'shorter'} than claimed"
        return Finding("fail", f"it decodes, but the code is {than_claimed}", evidence)
    if evidence["given_tokens"] > MOST_GIVEN * len(order.positions):
        return Finding("fail", f"{evidence['given_tokens']} tokens must be given before it decodes", evidence)
    given = f", given {evidence['given_tokens']} tokens of the stream" if evidence["given_tokens"] else ""
    return Finding("pass", f"{right} tokens came back from the artifact and a code as long as claimed{given}", evidence)


def _right(found: Iterator[int], expected: list[int], decoded: Callable[[int], None]) -> int:
    """How many tokens came back before the first wrong one; `decoded` is told of each."""
    right = 0
    for token, true in zip(found, expected, strict=True):
        if token != true:
            break
        right += 1
        decoded(1)
    return right


def slice_around(learned: int, targets: int, tokens: int) -> range:
    """Indices of an order: so many tokens, half of them before the first step of learning if that can be."""
    start = max(min(learned - tokens // 2, targets - tokens), 0)
    return range(start, min(start + tokens, targets))


def _encode(box: BlackBox, base: Baseline, coded: Tensor) -> np.ndarray:
    """The code of the targets, (W,) uint32, from predictions made step by step by somebody who knows the stream."""
    follower, encoder = Follower(box, base, base.tokens_N1, base.learned), Encoder()
    rows: dict[int, Tensor] = {}
    for position in coded.tolist():
        if position not in rows:
            rows = follower.rows(position)
        encoder.push(int(base.tokens_N1[position + 1]), rows[position])
    return encoder.words()


def _decode(box: BlackBox, base: Baseline, order: Order, span: range, words: np.ndarray) -> Iterator[int]:
    """The tokens, one by one; each is only then known to the pass."""
    unknown_N1 = order.unknown(span.start).to(base.tokens_N1.device)
    buffer_N1 = torch.where(unknown_N1, UNKNOWN, base.tokens_N1)
    follower, reader = Follower(box, base, buffer_N1), Decoder(words)
    for position in order.positions[span.start : span.stop].tolist():
        token = reader.pop(follower.rows(position)[position])
        buffer_N1[position + 1] = token
        yield token


def _honest_price(box: BlackBox, tokens_N1: Tensor) -> dict[str, float]:
    """Nats per token, claimed and as predicted without what comes later, of targets in the second half of a stream."""
    base = baseline(box, tokens_N1)
    order, N = stream_order(base), len(base.times_N)
    chosen = torch.linspace(N // 2, N - 1, PRICED).long().unique()
    honest = []
    for position in chosen.tolist():
        buffer_N1 = torch.where(order.unknown(position).to(tokens_N1.device), UNKNOWN, tokens_N1)
        row_V = Follower(box, base, buffer_N1).rows(position)[position]
        honest.append(-float(row_V[tokens_N1[position + 1]]))
    claimed = base.claims_N[chosen]
    price = torch.tensor(honest, dtype=torch.float64)
    return {
        "priced_targets": len(chosen),
        "claimed_nats": float(claimed.mean()),
        "honest_nats": float(price.mean()),
        "price_standard_error": float((price - claimed).std() / len(chosen) ** 0.5),
    }
