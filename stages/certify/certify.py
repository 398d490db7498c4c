"""All experiments on one evaluator and one artifact.

Legend: N targets.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from model.gpt import GPT
from stages import params
from stages.certify.black_box import BlackBox, baseline
from stages.certify.causality import causality
from stages.certify.decoder import decoder
from stages.certify.finding import Finding
from stages.certify.normalisation import normalisation
from stages.certify.score_first import score_first
from stages.certify.single_pass import single_pass
from stages.errors import UserError
from stages.evaluate.evaluator import Evaluator


def certify(
    make: Callable[[], Evaluator],
    model: GPT,
    load: Callable[[], GPT],
    tokens_N1: Tensor,
    settings: params.Certify,
    decoded: Callable[[int], None],
) -> dict[str, Finding]:
    """A finding per condition. `make` makes an evaluator; `model` is the artifact's network, which `load` reads anew.

    `tokens_N1` int64 is the validation stream, on the network's device. `decoded` is told how many more tokens came
    back from the decoder. Raises UserError if the evaluator's settings do not fit the stream.
    """
    box = BlackBox(make, model)
    N = piece_length(box, tokens_N1, settings)
    base = baseline(box, tokens_N1[: N + 1])
    if missed := int((base.times_N == 0).sum()):
        return _incomplete(missed)
    short_N1 = tokens_N1[: short_length(box, tokens_N1, N) + 1]
    causal, order = causality(box, base)
    unread = score_first(box, base, order)
    findings = {
        "causality": causal,
        "normalisation": normalisation(box, base, short_N1),
        "score_first": unread,
        "single_pass": single_pass(base, order, causal, unread),
        "decoder": decoder(box, BlackBox(make, load()), base, order, short_N1, tokens=settings.tokens, decoded=decoded),
    }
    if int(base.chunk_N.max()) == 0 and box.begin(tokens_N1).chunks > 1:
        return findings | {name: _doubted(findings[name], N) for name in ("causality", "score_first", "decoder")}
    return findings


def piece_length(box: BlackBox, tokens_N1: Tensor, settings: params.Certify) -> int:
    """Targets of the shortest beginning of the stream that has tokens to decode and a step of learning, in whole rows.

    If there is no such step in the first stream_tokens, as many as those. Raises UserError if even that is too short.
    """
    seq_len, targets = box.model.config.seq_len, len(tokens_N1) - 1
    most = min(settings.stream_tokens, targets) // seq_len
    least = min(-(-settings.tokens // seq_len) + 1, most)
    if not box.fits(tokens_N1[: most * seq_len + 1]):
        box.begin(tokens_N1)
        raise UserError(f"params.yaml: certify.stream_tokens ({settings.stream_tokens}): too few for this evaluator")
    while least < most:
        rows = (least + most) // 2
        piece = tokens_N1[: rows * seq_len + 1]
        if box.fits(piece) and box.begin(piece).chunks > 1:
            most = rows
        else:
            least = rows + 1
    return most * seq_len


def short_length(box: BlackBox, tokens_N1: Tensor, most: int) -> int:
    """Targets of a short beginning of the stream that the evaluator takes: a row and a quarter, or twice that, ..."""
    length = box.model.config.seq_len * 5 // 4
    while length < most and not box.fits(tokens_N1[: length + 1]):
        length *= 2
    return min(length, most)


def _incomplete(missed: int) -> dict[str, Finding]:
    """Nothing can be said of a score that leaves targets out."""
    why, evidence = f"{missed} targets of those tried are never scored", {"missed": missed}
    names = ("causality", "normalisation", "score_first", "single_pass", "decoder")
    return {name: Finding("fail" if name == "single_pass" else "unproven", why, evidence) for name in names}


def _doubted(finding: Finding, targets: int) -> Finding:
    """A pass proves nothing about learning where nothing was learned."""
    if finding.verdict != "pass":
        return finding
    why = f"nothing is learned in the first {targets} targets, on which it passes; see certify.stream_tokens"
    return replace(finding, verdict="unproven", why=why)
