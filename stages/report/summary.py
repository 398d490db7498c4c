"""At most a dozen figures that say how the experiment went: what `dvc metrics diff` and `dvc exp show` print."""

from statistics import mean
from typing import Any

from stages.report.runs import Run


def summarize(runs: list[Run], compressors: dict[str, float]) -> dict[str, float]:
    """Mean bpb over the seeds for the trained weights and each evaluator; the worst seed's bytes and seconds.

    `compressors` are general-purpose compressors' bits per byte on the same validation text.
    """
    figures = {"trained_bpb": _mean(run.train["val_bpb"] for run in runs)}
    for name in runs[0].scores:
        figures[f"{name}_bpb"] = _mean(run.scores[name]["val_bpb"] for run in runs)
    figures |= {f"{name}_bpb": round(bpb, 6) for name, bpb in compressors.items()}
    return figures | {
        "artifact_bytes": max(run.size["total_bytes"] for run in runs),
        "headroom_bytes": min(run.size["headroom_bytes"] for run in runs),
        "train_steps": max(run.train["steps"] for run in runs),
        "train_s": round(max(run.train["wall_s"] for run in runs), 1),
        "eval_s": round(max(sum(score["eval_s"] for score in run.scores.values()) for run in runs), 1),
    }


def _mean(values: Any) -> float:
    return round(mean(values), 6)
