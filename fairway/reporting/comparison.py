"""These runs beside published ones: a record's figures next to ours, and the test of a new record against an old one.

Whether a difference between two sets of seeds is more than chance is asked as the track asks it, by Welch's t-test.
"""

import math
from dataclasses import dataclass
from statistics import mean, variance

import mpmath

from fairway.reporting.published import PublishedRecord
from fairway.reporting.runs import Run
from fairway.reporting.scores import Score

# What the track demands of a new record: better by so many nats a token, at such a p (README of the challenge).
MARGIN_NATS = 0.005
SIGNIFICANCE = 0.01
# By what share the bytes of two scored texts may differ if it is still the same text, because tokenizers leave a few
# bytes of it unscored: 151,080,363 and 151,074,499 bytes are both the challenge's validation text.
SAME_TEXT = 1.0e-3


@dataclass(frozen=True)
class Comparison:
    """A score against a published record's. Positive gaps mean that ours is better; p is None if nothing was tested."""

    baseline: str
    evaluator: str
    gap_bpb: float
    gap_nats: float
    # One-sided p of Welch's test for being better at all, and for being better by MARGIN_NATS a token.
    p_better: float | None
    p_beats: float | None
    # Why there is no test, or why its outcome does not count.
    caveat: str | None

    @property
    def side(self) -> str:
        """On which side of the baseline's mean ours lies; below is better."""
        return "below" if self.gap_bpb > 0 else "above"

    @property
    def beats(self) -> bool:
        """Whether this is a new record by the track's rule."""
        return self.caveat is None and self.p_beats is not None and self.p_beats < SIGNIFICANCE


def compare(score: Score, runs: list[Run], baseline: str, record: PublishedRecord) -> Comparison:
    """Test a score against a record's reported figure.

    The test is made in bits per byte, which can be compared between tokenizers. The margin, which is given in nats a
    token, is turned into bits per byte by this run's tokens per byte; that is exact if both tokenizers are the same.
    """
    bits_per_nat = _tokens_per_byte(runs, score.name) / math.log(2)
    theirs = record.bpb(record.evaluator)
    gap_bpb = mean(theirs) - score.spread.mean
    gap_nats = gap_bpb / bits_per_nat
    untestable = _untestable(runs, score, baseline, record)
    if untestable:
        return Comparison(baseline, score.name, gap_bpb, gap_nats, None, None, untestable)
    p_better = welch(score.bpb, theirs)
    p_beats = welch(score.bpb, theirs, MARGIN_NATS * bits_per_nat)
    caveat = None if score.standing == "legal" else f"{score.name} is {score.remark}"
    return Comparison(baseline, score.name, gap_bpb, gap_nats, p_better, p_beats, caveat)


def _tokens_per_byte(runs: list[Run], evaluator: str) -> float:
    figures = [run.scores[evaluator] for run in runs]
    return sum(f["scored"] for f in figures) / sum(f["bytes"] for f in figures)


def _untestable(runs: list[Run], score: Score, name: str, record: PublishedRecord) -> str | None:
    """Why a score cannot be tested against the record of that name; None if it can."""
    if len(score.bpb) < 2:
        return "a test needs two seeds or more"
    return other_text(runs, name, record)


def other_text(runs: list[Run], name: str, record: PublishedRecord) -> str | None:
    """A clause that says that the record was scored on another text than these runs; None if it was the same text."""
    ours = next(iter(runs[0].scores.values()))
    scored_bytes = ours["bytes"] * ours["targets"] / ours["scored"]
    if abs(scored_bytes / record.val_bytes - 1) <= SAME_TEXT:
        return None
    return f"this run scored {scored_bytes:,.0f} bytes of another text, {name} {record.val_bytes:,} of the challenge's"


def welch(lower: list[float], higher: list[float], margin: float = 0.0) -> float:
    """One-sided p of Welch's t-test.

    It is the chance of such samples if the mean behind `lower` is not below that behind `higher` by over `margin`. Each
    sample needs two values. Source: Welch (1947), Biometrika 34; degrees of freedom by Satterthwaite (1946).
    """
    gap = mean(higher) - mean(lower) - margin
    errors = [variance(sample) / len(sample) for sample in (lower, higher)]
    if sum(errors) == 0:
        return 0.0 if gap > 0 else 1.0
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, (lower, higher), strict=True)
    )
    return _student_tail(gap / math.sqrt(sum(errors)), freedom)


def _student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution, by the regularized incomplete beta function."""
    beyond = float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
    return beyond if t > 0 else 1 - beyond


@dataclass(frozen=True)
class Beside:
    """One figure as reproduced and as published, each the mean over its seeds and None where it was not measured.

    `form` is the format that both are written in. `struck` says that ours is the figure of an illegal evaluator.
    """

    label: str
    reproduced: float | None
    published: float | None
    form: str
    struck: bool = False


@dataclass(frozen=True)
class Reproduction:
    """A published record, and its figures beside ours."""

    name: str
    record: PublishedRecord
    figures: list[Beside]
    # Why the bits per byte cannot be compared; None if they can.
    caveat: str | None


def reproduction(runs: list[Run], scores: list[Score], kept: str, name: str, record: PublishedRecord) -> Reproduction:
    """Set a record's figures beside ours; `kept` is training's name for the weights that went on to quantization."""
    rows = [*_on_the_way(runs, kept, record), *_evaluations(runs, scores, record), *_costs(runs, record)]
    known = [row for row in rows if (row.reproduced, row.published) != (None, None)]
    return Reproduction(name, record, known, other_text(runs, name, record))


def _on_the_way(runs: list[Run], kept: str, record: PublishedRecord) -> list[Beside]:
    """Bits per byte before the evaluators. Only the records measured adapted and quantized weights."""
    return [
        _means("last weights, bpb", ".5f", [run.train["val_bpb"] for run in runs], record.bpb("trained")),
        _means("kept weights, bpb", ".5f", [run.kept_bpb(kept) for run in runs], record.bpb("averaged")),
        _means("adapted weights, bpb", ".5f", [], record.bpb("adapted")),
        _means("quantized weights, bpb", ".5f", [], record.bpb("quantized")),
    ]


def _evaluations(runs: list[Run], scores: list[Score], record: PublishedRecord) -> list[Beside]:
    """Bits per byte of each evaluator; loss and seconds only of the one whose score the record reported."""
    rows = [
        _means(f"{score.name}, bpb", ".5f", score.bpb, record.bpb(score.name), score.standing == "illegal")
        for score in scores
    ]
    seeds = list(record.seeds.values())
    for score in scores:
        if score.name == record.evaluator:
            figures = [run.scores[score.name] for run in runs]
            losses, seconds = [f["val_loss"] for f in figures], [f["eval_s"] for f in figures]
            struck = score.standing == "illegal"
            rows += [
                _means("loss, nats a token", ".5f", losses, [seed.val_loss for seed in seeds], struck),
                _means(f"{score.name}, s", ",.1f", seconds, [seed.eval_s[score.name] for seed in seeds]),
            ]
    return rows


def _costs(runs: list[Run], record: PublishedRecord) -> list[Beside]:
    """Steps, time and bytes."""
    seeds = list(record.seeds.values())
    return [
        _means("parameters", ",.0f", [run.train["parameters"] for run in runs], [record.parameters]),
        _means("steps", ",.0f", [run.train["steps"] for run in runs], [seed.steps for seed in seeds]),
        _means("a step, ms", ",.2f", [run.train["step_ms"] for run in runs], [seed.step_ms for seed in seeds]),
        _means("training, s", ",.1f", [run.train["wall_s"] for run in runs], [seed.train_s for seed in seeds]),
        _means("model, bytes", ",.0f", [r.size["model_bytes"] for r in runs], [s.model_bytes for s in seeds]),
        _means("code, bytes", ",.0f", [r.size["train_gpt_bytes"] for r in runs], [s.code_bytes for s in seeds]),
        _means("artifact, bytes", ",.0f", [r.size["total_bytes"] for r in runs], [s.artifact_bytes for s in seeds]),
    ]


def _means(label: str, form: str, ours: list[float], theirs: list[float], struck: bool = False) -> Beside:
    return Beside(label, mean(ours) if ours else None, mean(theirs) if theirs else None, form, struck)
