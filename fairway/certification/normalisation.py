"""C2, normalisation: before a token is known there is one distribution over all tokens, and the claim is taken from it.

Three things are compared: what the evaluator claims for every target, what its batches predicted, and what it answers
when asked for a distribution. Then, on a short stream, a token is replaced by others that are drawn from its own
prediction: the claims for all tokens that could stand there must sum to 1, and they do if the prediction never moves.
Where it moves, the sum is estimated, as the mean over draws v of claimed(v)/predicted(v).

Legend: P positions, V vocabulary.
"""

import torch
from torch import Tensor

from fairway.certification.accounting import Finding
from fairway.certification.black_box import Baseline, BlackBox
from fairway.tokens.tokenizer import BOS

# Of single-precision logits.
TOLERANCE = 1e-5
DRAWS = 6


def normalisation(box: BlackBox, base: Baseline, short_N1: Tensor) -> Finding:
    """The finding. `short_N1` is the beginning of the stream, as short as the evaluator takes it."""
    tolerance = max(TOLERANCE, base.noise_nats)
    gap_N = (base.claims_N - base.nats_N).abs()
    asked, requested = _requested(box, base)
    ratios = torch.cat([_ratios(box, short_N1, int(share * (len(short_N1) - 2))) for share in (0.5, 0.9)])
    evidence = {
        "targets": len(gap_N),
        "largest_gap_nats": float(gap_N.max()),
        "sum_error": float((requested.exp().sum(-1) - 1).abs().max()),
        "request_gap_nats": float((requested - base.log_probs_NV[asked].cpu()).abs().max()),
        "draws": len(ratios),
        "sum": float(ratios.mean()),
        "sum_standard_error": float(ratios.std() / len(ratios) ** 0.5),
    }
    if not evidence["largest_gap_nats"] <= tolerance:
        mass = float((base.nats_N - base.claims_N).exp().mean())
        why = f"claimed probabilities are {mass:.6g} times those of the distributions, on average"
        return Finding("fail", why, evidence | {"claimed_over_predicted": mass})
    if not evidence["sum_error"] <= tolerance or not evidence["request_gap_nats"] <= 10 * tolerance:
        return Finding("fail", "distributions given on request are not those that score, or do not sum to 1", evidence)
    if not float(ratios.log().abs().max()) <= base.noise_nats:
        why = f"a token's prediction depends on the token: claims for all it could be sum to {evidence['sum']:.6g}"
        return Finding("fail", why, evidence)
    return Finding("pass", "each target has one distribution that sums to 1 and does not know the target", evidence)


def _requested(box: BlackBox, base: Baseline) -> tuple[list[int], Tensor]:
    """A few positions of the first batch, and the distributions (P, V) float64 that the evaluator answers with."""
    once = ((base.batch_N == 0) & (base.times_N == 1)).nonzero()[:, 0].tolist() or [0]
    asked = [once[0], once[len(once) // 2], once[-1]]
    return asked, box.log_probs(base.tokens_N1, asked)


def _ratios(box: BlackBox, tokens_N1: Tensor, position: int) -> Tensor:
    """Claimed over predicted probability of tokens drawn from the prediction at a position, each put in its place.

    The prediction is that of a stream with another token there. None of the tokens starts a document, which would be
    another layout.
    """
    predicted_V = _prediction(box, _with(tokens_N1, position, BOS + 1), position)
    weights_V = predicted_V.exp()
    weights_V[BOS] = 0
    generator = torch.Generator().manual_seed(position)
    drawn = torch.multinomial(weights_V, DRAWS, replacement=True, generator=generator).tolist()
    claimed = {token: _prediction(box, _with(tokens_N1, position, token), position)[token] for token in set(drawn)}
    return torch.stack([(claimed[token] - predicted_V[token]).exp() for token in drawn])


def _with(tokens_N1: Tensor, position: int, token: int) -> Tensor:
    """The stream with another token as the target of a position."""
    tokens = tokens_N1.clone()
    tokens[position + 1] = token
    return tokens


def _prediction(box: BlackBox, tokens_N1: Tensor, position: int) -> Tensor:
    """The log-probabilities (V,) of the first prediction of a position, float64."""
    wanted = torch.zeros(len(tokens_N1) - 1, dtype=torch.bool)
    wanted[position] = True
    for event in box.events(tokens_N1, wanted=wanted):
        rows = (event.positions_M == position).nonzero()
        if len(rows):
            return event.log_probs_MV[int(rows[0])].double().cpu()
    raise ValueError(f"position {position} is never predicted")
