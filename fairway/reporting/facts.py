"""All that the report says, worked out once. The summary, the table, the plots and the page only write it down."""

from dataclasses import dataclass
from typing import Any

from fairway.reporting.budgets import Budget, budgets
from fairway.reporting.comparison import Comparison, Reproduction, compare, reproduction
from fairway.reporting.published import Published, ReportSettings, named_record
from fairway.reporting.runs import Run
from fairway.reporting.scores import Rung, Score, ladder, scores


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
        subset=_subset(meta),
        comparison=compare(best, runs, *baseline) if baseline else None,
    )


def _subset(meta: dict[str, Any]) -> str | None:
    """What is scored, where that is less than all that is held out. `meta` is the tokens' meta.json."""
    scored, held_out = meta["val_documents"], meta["held_out_documents"]
    return f"the first {scored} of {held_out} validation documents" if scored < held_out else None
