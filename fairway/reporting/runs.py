"""What the stages left behind, gathered per seed.

How the loss goes along the validation stream: what test-time training gains, and where.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairway.certification.accounting import read_nats
from fairway.reporting.certificates import Certificate, load_certificate
from fairway.runtime.errors import UserError
from fairway.runtime.files import read_figures, require_file

# Of what training logged, what is drawn or submitted.
CURVES = ("val_bpb", "val_loss", "train_loss", "clock_s")


@dataclass(frozen=True)
class Run:
    """The figures of one seed: what each stage wrote down, with a score and a certificate per evaluator."""

    seed: int
    train: dict[str, Any]
    adapt: dict[str, Any]
    quantize: dict[str, Any]
    size: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    certificates: dict[str, Certificate]
    # Rows of (step, figure) while training, by the names of CURVES.
    curves: dict[str, list[tuple[float, float]]]
    # Mean nats along the stream, by evaluator (positions.py).
    profiles: dict[str, list[float]]

    def kept_bpb(self, kept: str) -> float:
        """Bits per byte of the weights that training calls `kept`. Raises UserError if that run did not keep them."""
        measured: dict[str, float] = self.train["val_bpb_by_weights"]
        if kept not in measured:
            raise UserError(
                f"artifacts/train/{self.seed}/train.json: no {kept}, which params.yaml names under average, "
                f"among {', '.join(measured)}; `python -m stages.train {self.seed}` makes it anew"
            )
        return measured[kept]


def collect(artifacts: Path, seeds: list[int], evaluators: list[str]) -> list[Run]:
    """Every seed's figures. Raises UserError naming the stage whose output in `artifacts` is missing or damaged."""
    return [_run(artifacts, seed, evaluators) for seed in seeds]


def _run(artifacts: Path, seed: int, evaluators: list[str]) -> Run:
    logged = artifacts / f"train/{seed}/live/plots/metrics"
    return Run(
        seed=seed,
        train=read_figures(artifacts / f"train/{seed}/train.json", f"python -m stages.train {seed}"),
        adapt=read_figures(artifacts / f"adapt/{seed}/adapt.json", f"python -m stages.adapt {seed}"),
        quantize=read_figures(artifacts / f"quantize/{seed}/quantize.json", f"python -m stages.quantize {seed}"),
        size=read_figures(artifacts / f"size_check/{seed}/size.json", f"python -m stages.size_check {seed}"),
        scores={name: read_figures(*_made(artifacts, "evaluate", seed, name, "metrics.json")) for name in evaluators},
        certificates={name: _certificate(artifacts, seed, name) for name in evaluators},
        curves={name: _curve(logged / f"{name}.tsv", name, f"python -m stages.train {seed}") for name in CURVES},
        profiles={
            name: profile(read_nats(*_made(artifacts, "evaluate", seed, name, "nats.npz"))) for name in evaluators
        },
    )


def _made(artifacts: Path, stage: str, seed: int, evaluator: str, file: str) -> tuple[Path, str]:
    """A file of a stage by evaluator, and the command that makes it."""
    return artifacts / f"{stage}/{seed}/{evaluator}/{file}", f"python -m stages.{stage} {seed} {evaluator}"


def _certificate(artifacts: Path, seed: int, evaluator: str) -> Certificate:
    path, made_by = _made(artifacts, "certify", seed, evaluator, "certificate.json")
    return load_certificate(path, evaluator, made_by)


def _curve(path: Path, name: str, made_by: str) -> list[tuple[float, float]]:
    with require_file(path, made_by).open(newline="", encoding="utf-8") as file:
        try:
            return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a table of step and {name}; run `{made_by}` again") from None


# Parts of the stream that a mean is taken over: enough to see a course, few enough to be steady.
PARTS = 48


def profile(nats_N: np.ndarray) -> list[float]:
    """Mean nats of each of PARTS equal parts of the stream (of each target where there are fewer), in order."""
    parts = min(PARTS, len(nats_N))
    bounds = np.linspace(0, len(nats_N), parts + 1).astype(np.int64)
    sums = np.add.reduceat(nats_N.astype(np.float64, copy=False), bounds[:-1])
    means: list[float] = (sums / np.diff(bounds)).tolist()
    return means


def share(part: int, parts: int) -> float:
    """The middle of a part, in percent of the stream."""
    return 100 * (part + 0.5) / parts
