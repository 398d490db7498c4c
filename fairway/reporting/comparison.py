"""The test of a new record against an old one.

Whether a difference between two sets of seeds is more than chance.
"""

import math
from dataclasses import dataclass
from statistics import mean

from fairway.reporting.published import PublishedRecord
from fairway.reporting.runs import Run
from fairway.reporting.scores import Score
from fairway.reporting.significance import MARGIN_NATS, SIGNIFICANCE, welch

# Tokenizers leave a few bytes of the same text unscored: 151,080,363 and 151,074,499 are both the challenge's.
SAME_TEXT = 1.0e-3


@dataclass(frozen=True)
class Comparison:
    """A score against a published record's: gaps above 0 are ours, p is None where nothing is tested."""

    baseline: str
    evaluator: str
    gap_bpb: float
    gap_nats: float
    # One-sided p of Welch's test, of being better at all and of being better by MARGIN_NATS a token.
    p_better: float | None
    p_beats: float | None
    # Why there is no test, or none to rely on.
    caveat: str | None

    @property
    def side(self) -> str:
        """Where our mean lies, of the baseline's; below is better."""
        return "below" if self.gap_bpb > 0 else "above"

    @property
    def beats(self) -> bool:
        """Whether this is a new record by the track's rule."""
        return self.caveat is None and self.p_beats is not None and self.p_beats < SIGNIFICANCE


def compare(score: Score, runs: list[Run], baseline: str, record: PublishedRecord) -> Comparison:
    """Test a score against a record's reported figure, in bits per byte, which compare across tokenizers.

    The margin becomes bits per byte by the tokens a byte of this run: exact where the tokenizers agree.
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


def other_text(runs: list[Run], name: str, record: PublishedRecord) -> str | None:
    """One clause if the record was scored on another text than these runs were; None on the same."""
    ours = next(iter(runs[0].scores.values()))
    scored_bytes = ours["bytes"] * ours["targets"] / ours["scored"]
    if abs(scored_bytes / record.val_bytes - 1) <= SAME_TEXT:
        return None
    return f"this run scored {scored_bytes:,.0f} bytes of another text, {name} {record.val_bytes:,} of the challenge's"


def _untestable(runs: list[Run], score: Score, name: str, record: PublishedRecord) -> str | None:
    if len(score.bpb) < 2:
        return "a test needs two seeds or more"
    return other_text(runs, name, record)
