"""All experiments on one evaluator and one artifact.

Legend: N targets.

C4, one pass: every target exactly once, in an order in which the evaluator is causal, and none looked at before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor

from fairway.certification.accounting import Finding
from fairway.certification.black_box import Baseline, BlackBox, baseline
from fairway.certification.causality import causality, score_first
from fairway.certification.decoder import choose_slices, decoder
from fairway.certification.excerpt import Excerpt, Order, choose_excerpt, short_beginning
from fairway.certification.normalisation import normalisation
from fairway.evaluation.evaluator import Evaluator
from fairway.model.gpt import GPT
from fairway.runtime.settings import Section
from fairway.tokens.tokenizer import BOS


class CertifySettings(Section):
    """How thoroughly an evaluator is tried."""

    # Tokens of the validation stream that are coded, and decoded again from the artifact alone.
    tokens: int = Field(gt=0)


@dataclass(frozen=True)
class Certified:
    """A finding per condition, and whether a decoder must be told where documents start before it can begin."""

    findings: dict[str, Finding]
    starts_told: bool


def certify(
    make: Callable[[], Evaluator],
    model: GPT,
    load: Callable[[], GPT],
    tokens_N1: Tensor,
    settings: CertifySettings,
    decoded: Callable[[int], None],
) -> Certified:
    """What is found out. `make` makes an evaluator, `load` the artifact's network, of which `model` is one.

    `tokens_N1` int64 is the validation stream, on the network's device. `decoded` is told how many more tokens came
    back from the decoder. Raises UserError if the evaluator's settings do not fit the stream.
    """
    box = BlackBox(make, model)
    excerpt = choose_excerpt(box, tokens_N1, tokens=settings.tokens)
    base = baseline(box, excerpt.tokens_N1)
    if missed := int((base.times_N == 0).sum()):
        return Certified(_incomplete(missed), starts_told=False)
    short_N1 = short_beginning(box, excerpt.tokens_N1)
    causal, order = causality(box, base, int((tokens_N1 == BOS).sum()))
    unread = score_first(box, base, order)
    slices = choose_slices(base, order, settings.tokens)
    findings = {
        "causality": causal,
        "normalisation": normalisation(box, base, short_N1),
        "score_first": unread,
        "single_pass": single_pass(base, order, causal, unread),
        "decoder": decoder(box, BlackBox(make, load()), base, slices, short_N1, decoded),
    }
    for name in ("causality", "score_first", "decoder"):
        findings[name] = _with_place(findings[name], excerpt, base)
    return Certified(findings, starts_told=order.name == "visits")


def _with_place(finding: Finding, excerpt: Excerpt, base: Baseline) -> Finding:
    """The finding with the part of the stream that was tried, and what the evaluator learned within it."""
    why = f"{finding.why}; tried on {excerpt.what}, {_learned(excerpt, base)}"
    return replace(finding, why=why, evidence=finding.evidence | {"tried_on": excerpt.what, "updates": base.updates})


def _learned(excerpt: Excerpt, base: Baseline) -> str:
    if base.updates:
        return f"with its first {base.updates} updates" if base.updates > 1 else "with one update"
    if excerpt.learns:
        return "where no chunk learns from another: what it holds is the same behind each"
    return "where no chunk learns from another, as nowhere in the whole stream"


def _incomplete(missed: int) -> dict[str, Finding]:
    """Nothing can be said of a score that leaves targets out."""
    why, evidence = f"{missed} targets of those tried are never scored", {"missed": missed}
    names = ("causality", "normalisation", "score_first", "single_pass", "decoder")
    return {name: Finding("fail" if name == "single_pass" else "unproven", why, evidence) for name in names}


def single_pass(base: Baseline, order: Order, causal: Finding, unread: Finding) -> Finding:
    """The finding, from the pass, which leaves nothing out, and from what C1 and C3 found."""
    times_N = base.times_N
    evidence = {
        "targets": len(times_N),
        "repeated": int((times_N > 1).sum()),
        "most_often": int(times_N.max()),
        "in_order": base.in_order,
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
