"""The score of each evaluator over all seeds, and whether its certificate lets it stand.

Bits per byte from stage to stage: what each step of the way gained or lost.

Stages that change weights without measuring them (adapt, quantize, compress) have no rung; what they did shows in the
evaluators', which all start from the kept weights.
"""

from dataclasses import dataclass
from statistics import mean

from fairway.reporting.certificates import Standing, broken, standing
from fairway.reporting.published import PublishedRecord
from fairway.reporting.runs import Run
from fairway.reporting.significance import Spread, spread

# What each kind of evaluator is, in a table's words. Names are those of params.yaml: a kind, or a kind with a suffix.
TITLES = {
    "sliding": "sliding window",
    "ttt": "score-first test-time training",
    "slot": "SLOT, an offset fitted at evaluation",
    "lora_ttt": "low-rank test-time training by document",
    "streaming": "one pass with rolling keys and values",
}


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
        """The standing, with what is broken: "illegal: causality, normalisation"."""
        words = ", ".join(name.replace("_", " ") for name in self.broken)
        return f"{self.standing}: {words}" if words else self.standing


def scores(runs: list[Run]) -> list[Score]:
    """One score an evaluator, in the order of params.yaml."""
    return [_score(name, runs) for name in runs[0].scores]


def _score(name: str, runs: list[Run]) -> Score:
    certificates = [run.certificates[name] for run in runs]
    bpb = [run.scores[name]["val_bpb"] for run in runs]
    return Score(name, bpb, standing(certificates), broken(certificates))


@dataclass(frozen=True)
class Rung:
    """A measured step: mean bpb over seeds, and where it came from (None: the first)."""

    name: str
    label: str
    bpb: float
    before: float | None
    standing: Standing | None
    # Mean of the published seeds, where the params name a record that measured the same.
    published: float | None


def ladder(runs: list[Run], scores: list[Score], kept: str, record: PublishedRecord | None) -> list[Rung]:
    """Last weights, kept weights (`kept`: training's name for them), then each evaluator."""
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
