"""All experiments on one evaluator and one artifact.

Legend: N targets.

C4, one pass: every target exactly once, in an order in which the evaluator is causal, and none looked at before.
"""

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field, model_validator
from torch import Tensor

from fairway.certification.accounting import Finding
from fairway.certification.black_box import Baseline, BlackBox, baseline
from fairway.certification.causality import causality, score_first
from fairway.certification.coding_order import Order
from fairway.certification.decoder import decoder
from fairway.certification.normalisation import normalisation
from fairway.evaluation.evaluator import Evaluator
from fairway.model.gpt import GPT
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section


class CertifySettings(Section):
    """How much of the validation stream the experiments on an evaluator run on."""

    # Tokens that are coded, and decoded again from the artifact alone.
    tokens: int = Field(gt=0)
    # The longest beginning of the stream that is run to find a step of learning in.
    stream_tokens: int = Field(gt=0)

    @model_validator(mode="after")
    def _agree(self) -> "CertifySettings":
        if self.tokens > self.stream_tokens:
            raise ValueError(f"tokens ({self.tokens}) exceeds stream_tokens ({self.stream_tokens})")
        return self


def certify(
    make: Callable[[], Evaluator],
    model: GPT,
    load: Callable[[], GPT],
    tokens_N1: Tensor,
    settings: CertifySettings,
    decoded: Callable[[int], None],
) -> dict[str, Finding]:
    """A finding per condition. `make` makes an evaluator, `load` the artifact's network, of which `model` is one.

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


def piece_length(box: BlackBox, tokens_N1: Tensor, settings: CertifySettings) -> int:
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


def single_pass(baseline: Baseline, order: Order, causal: Finding, unread: Finding) -> Finding:
    """The finding, from the pass, which leaves nothing out, and from what C1 and C3 found."""
    times_N = baseline.times_N
    evidence = {
        "targets": len(times_N),
        "repeated": int((times_N > 1).sum()),
        "most_often": int(times_N.max()),
        "in_order": bool((baseline.positions_E.diff() > 0).all()),
    }
    if evidence["repeated"]:
        often = evidence["most_often"]
        return Finding("fail", f"{evidence['repeated']} targets are scored repeatedly, up to {often} times", evidence)
    if unread.verdict == "fail":
        return Finding("fail", "targets are read, to fit something on them, before the pass that is reported", evidence)
    if not evidence["in_order"] and causal.verdict == "fail":
        return Finding("fail", "targets are not scored in the order of the stream", evidence)
    ordered = "in the order of the stream" if order.name == "stream" else "in the order of its visits"
    return Finding("pass", f"every target is scored once, {ordered}", evidence)
