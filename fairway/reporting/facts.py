"""All that the report says, worked out once. The summary, the table, the plots and the page only write it down.

A ladder of bits per byte shows where bits are lost and won back: the last weights, the weights that were kept and the
quantized ones, all on rows of one window; then windows that overlap; then every evaluator that does more than that.
Adaptation before quantization is not measured by itself: what it did shows in the level of the quantized weights.
"""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from fairway.reporting.budgets import Budget, budgets
from fairway.reporting.comparison import (
    Comparison,
    Published,
    PublishedRecord,
    ReportSettings,
    Reproduction,
    compare,
    named_record,
    reproduction,
)
from fairway.reporting.runs import Run, Score, Standing, scores


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


@dataclass(frozen=True)
class Facts:
    """The runs of all seeds, and what follows from them."""

    runs: list[Run]
    # Bits per byte of general-purpose compressors on the same text.
    compressors: dict[str, float]
    scores: list[Score]
    # The score of the evaluator that train_gpt.py runs, or the first score if that evaluator was not run.
    shipped: Score
    rungs: list[Rung]
    budgets: list[Budget]
    reproduction: Reproduction | None
    comparison: Comparison | None
    # "the first 800 of 50000 validation documents", where tokenize.val_limit_documents left the others out.
    subset: str | None

    @property
    def on_track(self) -> bool:
        """Whether every run was trained, and scored by what ships, on as many GPUs as the track's machine has."""
        return all(budget.comparable for budget in self.budgets)


def facts(
    runs: list[Run],
    published: Published,
    meta: dict[str, Any],
    *,
    report: ReportSettings,
    kept: str,
    shipped: str,
) -> Facts:
    """Work out the report.

    `meta` is the tokens' meta.json, `kept` the kind of weights that went on after training, and `shipped` the name of
    the evaluator that ships. Raises UserError if params.yaml names a record that was not published.
    """
    record = named_record(published, "record", report.record)
    baseline = named_record(published, "baseline", report.baseline)
    found = scores(runs)
    best = next((score for score in found if score.name == shipped), found[0])
    reproduced = reproduction(runs, found, kept, *record) if record else None
    comparable = reproduced.record if reproduced and not reproduced.caveat else None
    return Facts(
        runs=runs,
        compressors={name: 8 * size / meta["val_text_bytes"] for name, size in meta["compressed_val_bytes"].items()},
        scores=found,
        shipped=best,
        rungs=ladder(runs, found, kept, comparable),
        budgets=budgets(runs, best.name),
        reproduction=reproduced,
        subset=subset(meta),
        comparison=compare(best, runs, *baseline) if baseline else None,
    )


def ladder(runs: list[Run], scores: list[Score], kept: str, record: PublishedRecord | None) -> list[Rung]:
    """The levels: last weights, kept weights (`kept` is training's name for them), quantized ones, each evaluator.

    Sliding windows start from the quantized weights, and the other evaluators, which have them too, from the first
    score by sliding windows, or from the quantized weights if there is none.
    """
    trained = mean(run.train["val_bpb"] for run in runs)
    rungs = [Rung("trained", "last weights", trained, None, None, _published(record, "trained"))]
    level = trained
    if kept != "last":
        level = mean(run.kept_bpb(kept) for run in runs)
        rungs.append(Rung("averaged", f"kept weights, {kept}", level, trained, None, _published(record, "averaged")))
    quantized = mean(run.quantize["quantized_rows_bpb"] for run in runs)
    rungs.append(Rung("quantized", "as stored", quantized, level, None, _published(record, "quantized")))
    windows = [score for score in scores if score.kind == "sliding"]
    slid = windows[0].spread.mean if windows else quantized
    for score in [*windows, *(score for score in scores if score not in windows)]:
        before = quantized if score in windows else slid
        found = _published(record, score.name)
        rungs.append(Rung(score.name, score.title, score.spread.mean, before, score.standing, found))
    return rungs


def _published(record: PublishedRecord | None, name: str) -> float | None:
    values = record.bpb(name) if record else []
    return mean(values) if values else None


def subset(meta: dict[str, Any]) -> str | None:
    """What is scored, where that is less than all that is held out. `meta` is the tokens' meta.json."""
    scored, held_out = meta["val_documents"], meta["held_out_documents"]
    return f"the first {scored} of {held_out} validation documents" if scored < held_out else None
