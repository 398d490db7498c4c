"""These runs beside published ones: a record's figures next to ours, and the test of a new record against an old one.

The published figures of records are read from records/published.yaml, and params.yaml says which of them are shown.
Whether a difference between two sets of seeds is more than chance is asked as the track asks it, by Welch's t-test.
Whether two scores of the same text differ by more than chance is asked document by document, by Student's paired test.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Annotated, Literal

import mpmath
import numpy as np
from pydantic import Field, model_validator

from fairway.reporting.runs import Run, Score
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section, load_section


class ReportSettings(Section):
    """Two names in records/published.yaml, or null: the record whose figures are shown beside ours, and the record
    that our score is tested against."""

    record: str | None
    baseline: str | None


# The kinds of weights that are scored on the way to an evaluator.
WEIGHTS = ("trained", "averaged", "adapted", "quantized")
# What a figure belongs to: one of these kinds of weights, or an evaluator, by a name that params.yaml could give it,
# such as sliding_64, the second stride of PR #1488. A test checks that there is such an evaluator. The code cannot: it
# would have to import all evaluators, and the report would then run again whenever one of them changes.
Pass = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")]


class PublishedSeed(Section):
    """The figures of one seed. Their meaning and units are explained at the top of the file."""

    val_bpb: float = Field(gt=0)
    val_loss: float = Field(gt=0)
    artifact_bytes: int = Field(gt=0)
    model_bytes: int = Field(gt=0)
    code_bytes: int = Field(gt=0)
    steps: int = Field(gt=0)
    train_s: float = Field(gt=0)
    step_ms: float = Field(gt=0)
    bpb: dict[Pass, float]
    # Seconds of the same passes, and under "adapt" the seconds of training on validation tokens.
    eval_s: dict[Pass, float]
    other_s: dict[Literal["calibration", "pack", "unpack"], float]

    @model_validator(mode="after")
    def _bytes(self) -> "PublishedSeed":
        if self.artifact_bytes != self.model_bytes + self.code_bytes:
            raise ValueError(f"artifact_bytes ({self.artifact_bytes}) must be model_bytes + code_bytes")
        return self


class PublishedRecord(Section):
    """One record: where it comes from, what was scored how, and the figures of its seeds."""

    pull_request: int = Field(gt=0)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    status: str
    evaluator: Pass
    parameters: int = Field(gt=0)
    val_targets: int = Field(gt=0)
    val_bytes: int = Field(gt=0)
    seeds: dict[int, PublishedSeed] = Field(min_length=1)

    def bpb(self, name: str) -> list[float]:
        """Bits per byte by seed of a kind of weights or of an evaluator; empty if none was published."""
        if name == self.evaluator:
            return [seed.val_bpb for seed in self.seeds.values()]
        return [bpb for seed in self.seeds.values() for key, bpb in seed.bpb.items() if key == name]


class Published(Section):
    """The whole file: records by name."""

    records: dict[str, PublishedRecord]


def load_published(path: Path) -> Published:
    """Read and check the file. Raises UserError (one line: file, key, what was expected) on any fault."""
    return load_section(path, Published)


def named_record(published: Published, key: str, name: str | None) -> tuple[str, PublishedRecord] | None:
    """The name that params.yaml gives under `report.<key>`, with the record of that name; None if it gives none.

    Raises UserError if there is no such record.
    """
    if name is None:
        return None
    if name not in published.records:
        known = ", ".join(published.records)
        raise UserError(f"params.yaml: report.{key}: no record {name!r} in records/published.yaml (known: {known})")
    return name, published.records[name]


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
class Paired:
    """Two scores of the same documents, in bits per byte over all of them; a gap below zero means a better second one.

    `error_bpb` is the standard error of the gap and `p` the two-sided p of the test; both are None where there are
    fewer than two documents, or no document differs. `better` and `worse` count the documents of the second score.
    """

    documents: int
    gap_bpb: float
    error_bpb: float | None
    p: float | None
    better: int
    worse: int


def paired(first_D: np.ndarray, second_D: np.ndarray, bytes_D: np.ndarray) -> Paired:
    """Student's paired t-test of the bits (D,) that two scores give the same D documents of these bytes (D,).

    It asks whether the gap in bits per byte could be chance, were these documents drawn from many like them, and knows
    nothing of seeds. The gap is a ratio of sums, and so its standard error comes from what each document's bits differ
    by beyond that gap times its bytes: a document counts by its length, as it does in the score. Source: Student
    (1908), Biometrika 6; the error of a ratio: Cochran (1977), Sampling Techniques, chapter 6.
    """
    gaps_D = second_D - first_D
    documents, total = len(gaps_D), float(bytes_D.sum())
    gap = float(gaps_D.sum()) / total
    better, worse = int((gaps_D < 0).sum()), int((gaps_D > 0).sum())
    if documents < 2 or not better + worse:
        return Paired(documents, gap, None, None, better, worse)
    beyond = float(np.square(gaps_D - gap * bytes_D).sum())
    error = math.sqrt(documents / (documents - 1) * beyond) / total
    p = 2 * _student_tail(abs(gap) / error, documents - 1) if error else 0.0
    return Paired(documents, gap, error, p, better, worse)


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
    """Bits per byte before the evaluators. Only the records measured adapted weights by themselves."""
    quantized = [run.quantize["quantized_rows_bpb"] for run in runs]
    return [
        _means("last weights, bpb", ".5f", [run.train["val_bpb"] for run in runs], record.bpb("trained")),
        _means("kept weights, bpb", ".5f", [run.kept_bpb(kept) for run in runs], record.bpb("averaged")),
        _means("adapted weights, bpb", ".5f", [], record.bpb("adapted")),
        _means("quantized weights, bpb", ".5f", quantized, record.bpb("quantized")),
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
