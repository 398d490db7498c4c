"""What the stages left behind, gathered per seed."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files import require_file


@dataclass(frozen=True)
class Run:
    """The figures of one seed: training, size and one score per evaluator."""

    seed: int
    train: dict[str, Any]
    size: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    # Rows of (step, val_bpb) while training.
    curve: list[tuple[int, float]]


def collect(artifacts: Path, seeds: list[int], evaluators: list[str]) -> list[Run]:
    """Read every seed's figures from `artifacts`. Raises UserError naming the stage whose output is missing."""
    return [_run(artifacts, seed, evaluators) for seed in seeds]


def _run(artifacts: Path, seed: int, evaluators: list[str]) -> Run:
    train = artifacts / "train" / str(seed)
    return Run(
        seed=seed,
        train=_json(train / "train.json", f"python -m stages.train {seed}"),
        size=_json(artifacts / "size_check" / str(seed) / "size.json", f"python -m stages.size_check {seed}"),
        scores={
            name: _json(
                artifacts / "evaluate" / str(seed) / name / "metrics.json", f"python -m stages.evaluate {seed} {name}"
            )
            for name in evaluators
        },
        curve=_curve(train / "live" / "plots" / "metrics" / "val_bpb.tsv", f"python -m stages.train {seed}"),
    )


def _json(path: Path, made_by: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(require_file(path, made_by).read_text(encoding="utf-8"))
    return figures


def _curve(path: Path, made_by: str) -> list[tuple[int, float]]:
    with require_file(path, made_by).open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row["val_bpb"])) for row in csv.DictReader(file, delimiter="\t")]
