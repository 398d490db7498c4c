"""The score of each evaluator over all seeds, whether its certificates let it stand, and the levels on the way to it.

A ladder of bits per byte shows what each measured step gained or lost: the last weights, the weights that were kept,
then every evaluator. Stages that change weights without measuring them (adapt, quantize, compress) have no level of
their own. What they did shows in the evaluators' levels, which therefore all start from the kept weights.
"""

from dataclasses import dataclass
from statistics import mean, stdev

from fairway.reporting.published import PublishedRecord
from fairway.reporting.runs import VERDICTS, Certificate, Condition, Run, Standing

# What each kind of evaluator is, in the words of a table. A name in params.yaml is a kind, or a kind with a suffix.
TITLES = {
    "sliding": "sliding window",
    "ttt": "score-first test-time training",
    "slot": "SLOT, an offset fitted at evaluation",
    "lora_ttt": "low-rank test-time training by document",
    "streaming": "one pass with rolling keys and values",
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a figure over seeds; std is None for a single seed."""

    mean: float
    std: float | None


def spread(values: list[float]) -> Spread:
    """Mean and deviation of at least one value."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Score:
    """Bits per byte of one evaluator by seed, with the standing that its certificates give it."""

    name: str
    bpb: list[float]
    standing: Standing
    # Names of the conditions that fail.
    broken: list[str]

    @property
    def spread(self) -> Spread:
        """Mean and deviation over the seeds."""
        return spread(self.bpb)

    @property
    def label(self) -> str:
        """The name, with the standing unless it is legal: "slot (illegal)"."""
        return self.name if self.standing == "legal" else f"{self.name} ({self.standing})"

    @property
    def title(self) -> str:
        """What the evaluator is, in a few words."""
        kinds = [kind for kind in TITLES if self.name == kind or self.name.startswith(f"{kind}_")]
        return TITLES[max(kinds, key=len)] if kinds else "an evaluator of your own"

    @property
    def remark(self) -> str:
        """The standing, followed by the conditions that fail: "illegal: causality, normalisation"."""
        words = ", ".join(name.replace("_", " ") for name in self.broken)
        return f"{self.standing}: {words}" if words else self.standing


def scores(runs: list[Run]) -> list[Score]:
    """One score for each evaluator, in the order of params.yaml."""
    return [_score(name, runs) for name in runs[0].scores]


def _score(name: str, runs: list[Run]) -> Score:
    certificates = [run.certificates[name] for run in runs]
    bpb = [run.scores[name]["val_bpb"] for run in runs]
    return Score(name, bpb, standing(certificates), broken(certificates))


def standing(certificates: list[Certificate]) -> Standing:
    """The standing over all seeds: legal if it is legal on every seed, and illegal if it is so on any."""
    found = {certificate.standing for certificate in certificates}
    if "illegal" in found:
        return "illegal"
    return "legal" if found == {"legal"} else "unproven"


def broken(certificates: list[Certificate]) -> list[str]:
    """Names of the conditions that fail on any seed, in the order of the certificates."""
    names = dict.fromkeys(name for certificate in certificates for name in certificate.conditions)
    return [name for name in names if (finding := worst(certificates, name)) and finding.verdict == "fail"]


def worst(certificates: list[Certificate], condition: str) -> Condition | None:
    """Of all seeds' findings on a condition the one that decides: a failure before a doubt before a pass.

    None if no certificate names the condition.
    """
    found = [certificate.conditions[condition] for certificate in certificates if condition in certificate.conditions]
    return min(found, key=lambda finding: VERDICTS.index(finding.verdict), default=None)


@dataclass(frozen=True)
class Rung:
    """A level of the ladder: the mean bpb over seeds, and the level that it is compared with (None for the first)."""

    name: str
    label: str
    bpb: float
    before: float | None
    standing: Standing | None
    # The mean over the published seeds, if params.yaml names a record that measured the same.
    published: float | None


def ladder(runs: list[Run], scores: list[Score], kept: str, record: PublishedRecord | None) -> list[Rung]:
    """The levels: last weights, kept weights (`kept` is training's name for them), then each evaluator."""
    trained = mean(run.train["val_bpb"] for run in runs)
    rungs = [Rung("trained", "last weights", trained, None, None, _published(record, "trained"))]
    level = trained
    if kept != "last":
        level = mean(run.kept_bpb(kept) for run in runs)
        rungs.append(Rung("averaged", f"kept weights, {kept}", level, trained, None, _published(record, "averaged")))
    return rungs + [
        Rung(score.name, score.title, score.spread.mean, level, score.standing, _published(record, score.name))
        for score in scores
    ]


def _published(record: PublishedRecord | None, name: str) -> float | None:
    values = record.bpb(name) if record else []
    return mean(values) if values else None
