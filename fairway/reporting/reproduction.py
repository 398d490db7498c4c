"""Reproduced figures beside published ones."""

from dataclasses import dataclass
from statistics import mean

from fairway.reporting.comparison import other_text
from fairway.reporting.published import PublishedRecord
from fairway.reporting.runs import Run
from fairway.reporting.scores import Score


@dataclass(frozen=True)
class Beside:
    """A figure as reproduced and as published: the mean over each one's seeds, to be written in the format `form`.

    None where there is no such figure; `struck` if ours is of an illegal evaluator.
    """

    label: str
    reproduced: float | None
    published: float | None
    form: str
    struck: bool = False


@dataclass(frozen=True)
class Reproduction:
    """A published record and its figures beside these."""

    name: str
    record: PublishedRecord
    figures: list[Beside]
    # Why the bits per byte do not compare, if so.
    caveat: str | None


def reproduction(runs: list[Run], scores: list[Score], kept: str, name: str, record: PublishedRecord) -> Reproduction:
    """Set a record's figures beside these; `kept` is training's name for the weights that went on."""
    rows = [*_on_the_way(runs, kept, record), *_evaluations(runs, scores, record), *_costs(runs, record)]
    known = [row for row in rows if (row.reproduced, row.published) != (None, None)]
    return Reproduction(name, record, known, other_text(runs, name, record))


def _on_the_way(runs: list[Run], kept: str, record: PublishedRecord) -> list[Beside]:
    """Bits per byte before the evaluators; adapted and quantized weights are measured by the records alone."""
    return [
        _means("last weights, bpb", ".5f", [run.train["val_bpb"] for run in runs], record.bpb("trained")),
        _means("kept weights, bpb", ".5f", [run.kept_bpb(kept) for run in runs], record.bpb("averaged")),
        _means("adapted weights, bpb", ".5f", [], record.bpb("adapted")),
        _means("quantized weights, bpb", ".5f", [], record.bpb("quantized")),
    ]


def _evaluations(runs: list[Run], scores: list[Score], record: PublishedRecord) -> list[Beside]:
    """Bits per byte of each evaluator; loss and seconds of the one that was published, if it was run."""
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
