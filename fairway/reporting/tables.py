"""The report as text and tables: what stands in results/ beside the page.

`markdown` is the table that README shows, `summarize` the figures that `dvc metrics diff` and `dvc exp show` print.
`curve`, `positions` and `sizes` are small tables for `dvc plots`: a line for each point, with the series in a column of
its own. git tracks all of these, so that they hold scores and bytes alone: whoever gets the same scores gets the same
files. Seconds differ from run to run; `timing`, `times` and `time_table` have them, which git ignores.
"""

import re
from dataclasses import dataclass
from typing import Any

from fairway.reporting.budgets import ledger
from fairway.reporting.comparison import MARGIN_NATS, SIGNIFICANCE
from fairway.reporting.facts import Facts
from fairway.reporting.runs import Run, Score, Standing, share, spread


def markdown(facts: Facts) -> str:
    """A table of bits per byte with a row for each figure, then sentences on the size and on the test of the score.

    If there are several seeds, each has a column, and so have mean and deviation.
    """
    runs = facts.runs
    several = len(runs) > 1
    scored = f"bits per byte of {facts.subset or 'validation text'}"
    head = [scored, *(f"seed {run.seed}" for run in runs), *["mean ± std"] * several]
    rows = [[f"`{name}`", *[f"{bpb:.4f}"] * (len(runs) + several)] for name, bpb in facts.compressors.items()]
    rows.append(["trained weights, rows of one window", *_cells([run.train["val_bpb"] for run in runs])])
    rows += [_score_row(score) for score in facts.scores]
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1)), *map(_row, rows)]
    return "\n".join([*lines, "", _sentence(facts), *_verdict(facts)]) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(bpb: list[float]) -> list[str]:
    """The figures by seed; of several also their mean and deviation."""
    cells = [f"{value:.4f}" for value in bpb]
    found = spread(bpb)
    return cells if found.std is None else [*cells, f"{found.mean:.4f} ± {found.std:.4f}"]


def _score_row(score: Score) -> list[str]:
    """The row of a score. Illegal figures are struck out, and unproven ones are labelled."""
    label = f"`{score.name}`: compressed model, {score.title}"
    if score.standing == "illegal":
        return [f"{label} *({score.remark})*", *(f"~~{cell}~~" for cell in _cells(score.bpb))]
    return [label if score.standing == "legal" else f"{label} *(unproven)*", *_cells(score.bpb)]


def _sentence(facts: Facts) -> str:
    size, _, _ = facts.budgets
    steps = max(run.train["steps"] for run in facts.runs)
    return (
        f"{size.used:,.0f} bytes of code and model, {size.limit - size.used:,.0f} to spare; {steps} steps of training."
    )


def _verdict(facts: Facts) -> list[str]:
    """A sentence on the outcome of the test against the baseline; none if params.yaml names no baseline."""
    found = facts.comparison
    if found is None:
        return []
    if found.p_beats is None:
        return ["", f"Not tested against {found.baseline}: {found.caveat}."]
    outcome = "beats" if found.beats else "does not beat"
    caveat = f" ({found.caveat})" if found.caveat else ""
    return [
        "",
        f"`{found.evaluator}` {outcome} {found.baseline} by {MARGIN_NATS} nats at p < {SIGNIFICANCE}{caveat}: "
        f"{found.gap_nats:+.4f} nats a token, p = {found.p_beats:.4f}.",
    ]


def summarize(facts: Facts) -> dict[str, float]:
    """The mean bpb over seeds by evaluator, the shipped one's deviation and test, and the bytes of the largest seed.

    A score that its certificate does not call legal says so in its name, so that nobody takes it for the best one.
    """
    figures = {"trained_bpb": round(facts.rungs[0].bpb, 6)}
    figures |= {metric(score): round(score.spread.mean, 6) for score in facts.scores}
    if facts.shipped.spread.std is not None:
        figures["bpb_std"] = round(facts.shipped.spread.std, 6)
    if facts.comparison and facts.comparison.p_beats is not None:
        figures["p_beats_baseline"] = round(facts.comparison.p_beats, 6)
    if "xz" in facts.compressors:
        figures["xz_bpb"] = round(facts.compressors["xz"], 6)
    size, _, _ = facts.budgets
    return figures | {"artifact_bytes": int(size.used)}


def metric(score: Score) -> str:
    """The name of a score among the figures: slot_bpb, or slot_bpb_illegal."""
    return f"{score.name}_bpb" if score.standing == "legal" else f"{score.name}_bpb_{score.standing}"


def scores_of(summary: dict[str, float]) -> dict[str, tuple[float, Standing]]:
    """The scores among the figures of `summarize`: bits per byte and standing by evaluator."""
    found: dict[str, tuple[float, Standing]] = {}
    for name, figure in summary.items():
        match = re.fullmatch(r"(?!(?:trained|xz)_bpb)(\w+)_bpb(?:_(illegal|unproven))?", name)
        if match:
            standing: Standing = match[2] or "legal"  # type: ignore[assignment]
            found[match[1]] = (figure, standing)
    return found


def timing(facts: Facts) -> str:
    """A sentence on the seconds of `times`."""
    _, training, evaluation = facts.budgets
    return f"Training took {training.used:.0f} s, evaluation with `{facts.shipped.name}` {evaluation.used:.0f} s."


def times(facts: Facts) -> dict[str, float]:
    """Seconds of training and of the evaluation that ships, as the track counts them, each of the slowest seed."""
    _, training, evaluation = facts.budgets
    return {"train_s": round(training.used, 1), "eval_s": round(evaluation.used, 1)}


def time_table(runs: list[Run]) -> list[dict[str, Any]]:
    """The ledger of time, fit for JSON: work, evaluator, budget, and seconds by seed. DVC shows no lists as metrics."""
    return [
        {
            "work": entry.work,
            "evaluator": entry.evaluator,
            "budget": entry.budget,
            "seconds": {str(run.seed): seconds for run, seconds in zip(runs, entry.seconds, strict=True)},
        }
        for entry in ledger(runs)
    ]


def curve(facts: Facts) -> str:
    """CSV of validation bits per byte by step, with a series for each seed."""
    rows = [f"seed {run.seed},{step},{bpb:.6f}" for run in facts.runs for step, bpb in run.curves["val_bpb"]]
    return "\n".join(["series,step,val_bpb", *rows]) + "\n"


def positions(facts: Facts) -> str:
    """CSV of the first seed's mean nats a token along the validation stream (percent), with a series by evaluator."""
    profiles = [(score.label, facts.runs[0].profiles[score.name]) for score in facts.scores]
    rows = [
        f"{label},{share(part, len(means)):.2f},{nats:.6f}"
        for label, means in profiles
        for part, nats in enumerate(means)
    ]
    return "\n".join(["series,percent_of_stream,nats", *rows]) + "\n"


def sizes(facts: Facts) -> str:
    """CSV of the bytes of each part of the first seed's artifact."""
    rows = [f"{part.name},{part.size_bytes}" for part in size_parts(facts.runs[0].size)]
    return "\n".join(["part,bytes", *rows]) + "\n"


# The parts of an artifact in words, by their names in size.json.
NAMES = {
    "attn": "attention",
    "mlp": "MLP",
    "embed": "token table",
    "other": "other tables",
    "float16": "float16 tensors",
    "header": "header",
    "train_gpt.py": "code (train_gpt.py)",
}


@dataclass(frozen=True)
class Part:
    """The bytes of one part, and their bits per weight if it is a class of tensors."""

    name: str
    size_bytes: int
    bits_per_weight: float | None


def size_parts(size: dict[str, Any]) -> list[Part]:
    """The parts in size.json, which sum to its total_bytes: classes of tensors, float16 tensors, header, code."""
    classes = size["classes"]
    parts = [
        Part(NAMES.get(kind, kind), size_bytes, classes[kind]["bits_per_weight"] if kind in classes else None)
        for kind, size_bytes in size["parts"].items()
    ]
    assert sum(part.size_bytes for part in parts) == size["total_bytes"], "every byte has its part"
    return parts
