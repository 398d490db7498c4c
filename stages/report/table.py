"""The report as a Markdown table."""

from stages.report.runs import Run

# What each evaluator is, in the words of the table; slot's figure is no code length (spec: PR #1240).
DESCRIPTIONS = {
    "sliding": "compressed model, sliding window",
    "ttt": "compressed model, score-first test-time training",
    "slot": "compressed model, SLOT *(fits the tokens it scores: not a code length)*",
}


def markdown(runs: list[Run], compressors: dict[str, float], summary: dict[str, float]) -> str:
    """One row per figure: bits per byte, lower is better, then size and time. Several seeds get a column each."""
    seeds = [str(run.seed) for run in runs]
    head = ["bits per byte of validation text", *(f"seed {seed}" for seed in seeds)]
    rows = [[f"`{name}`", *[f"{bpb:.4f}"] * len(runs)] for name, bpb in compressors.items()]
    rows.append(["trained weights, rows of one window", *(f"{run.train['val_bpb']:.4f}" for run in runs)])
    for name in runs[0].scores:
        cells = [f"{run.scores[name]['val_bpb']:.4f}" for run in runs]
        rows.append([f"`{name}`: {DESCRIPTIONS[name]}", *(_struck(cell) if name == "slot" else cell for cell in cells)])
    lines = [_row(head), _row(["---"] + ["---:"] * len(runs)), *map(_row, rows)]
    return "\n".join(lines) + "\n\n" + _sentence(summary) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _struck(cell: str) -> str:
    return f"~~{cell}~~"


def _sentence(summary: dict[str, float]) -> str:
    return (
        f"{summary['artifact_bytes']:,.0f} bytes of code and model, {summary['headroom_bytes']:,.0f} to spare; "
        f"{summary['train_steps']:.0f} steps in {summary['train_s']:.0f} s; evaluation {summary['eval_s']:.0f} s."
    )
