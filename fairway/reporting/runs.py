"""What the stages left behind, gathered by seed, and the score of each evaluator over all seeds.

By seed there are figures, certificates, and the course of every score along the stream. A score has its mean and
spread over the seeds, and the standing that its certificates give it. What else follows from the figures of all seeds
together is worked out in the other files.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fairway.runtime.errors import UserError
from fairway.runtime.files import read_array, read_figures, require_file
from fairway.runtime.settings import TRACK_GPUS

# The curves that training logged and that are drawn or submitted.
CURVES = ("val_bpb", "val_loss", "train_loss", "micro_grad_norm", "clock_s")

# The verdicts on a condition, the one that outweighs the others first.
VERDICTS = ("fail", "unproven", "pass")
Standing = Literal["legal", "illegal", "unproven"]


class Condition(BaseModel):
    """One condition of a meaningful score: the verdict on it, the reason, and what was measured to reach it."""

    model_config = ConfigDict(strict=True, frozen=True)

    verdict: Literal["fail", "unproven", "pass"]
    why: str
    evidence: dict[str, Any]


class Certificate(BaseModel):
    """What certify found out about one evaluator on one seed. Keys of the file beyond these are not read here."""

    model_config = ConfigDict(strict=True, frozen=True)

    evaluator: str
    legal: bool | Literal["unproven"]
    conditions: dict[str, Condition] = Field(min_length=1)
    certify_s: float

    @property
    def standing(self) -> Standing:
        """What the certificate says of the score, in one word."""
        if isinstance(self.legal, bool):
            return "legal" if self.legal else "illegal"
        return "unproven"


@dataclass(frozen=True)
class Run:
    """The figures of one seed: what each stage wrote down, with a score and a certificate for each evaluator."""

    seed: int
    train: dict[str, Any]
    adapt: dict[str, Any]
    quantize: dict[str, Any]
    compress: dict[str, Any]
    size: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    certificates: dict[str, Certificate]
    # Pairs of step and figure that were logged while training, by the names of CURVES.
    curves: dict[str, list[tuple[float, float]]]
    # The course of the loss along the validation stream (see profile), by evaluator.
    profiles: dict[str, list[float]]

    @property
    def trained_on_track(self) -> bool:
        """Whether what counts as training ran on as many GPUs as the track's machine has.

        Seconds of any other machine say nothing of the track's limits. Calibration counts too, but takes one GPU.
        """
        environment = self.train["environment"]
        trained = _on_track(environment["processes"], environment["cuda"] is not None)
        return trained and self._adapted_on_track("train")

    def scored_on_track(self, evaluator: str) -> bool:
        """The same of what counts as evaluation by this evaluator, which may have run with other processes."""
        scored = self.scores[evaluator]
        return _on_track(scored["processes"], scored["on_gpus"]) and self._adapted_on_track("validation")

    def _adapted_on_track(self, split: str) -> bool:
        """Whether adaptation to that text ran on the track's GPUs; true where there was none."""
        adapt = self.adapt
        return not adapt["epochs"] or adapt["split"] != split or _on_track(adapt["processes"], adapt["on_gpus"])

    def kept_bpb(self, kept: str) -> float:
        """Bits per byte of the weights that training calls `kept`. Raises UserError if that run did not keep them."""
        measured: dict[str, float] = self.train["val_bpb_by_weights"]
        if kept not in measured:
            raise UserError(
                f"artifacts/train/{self.seed}/train.json: no {kept}, which params.yaml names under average, "
                f"among {', '.join(measured)}; `python -m stages.train {self.seed}` makes it anew"
            )
        return measured[kept]


def _on_track(processes: int, on_gpus: bool) -> bool:
    """Whether so many processes worked on as many GPUs as the track's machine has."""
    return on_gpus and processes == TRACK_GPUS


def collect(artifacts: Path, seeds: list[int], evaluators: list[str]) -> list[Run]:
    """Every seed's figures. Raises UserError naming the stage whose output in `artifacts` is missing or damaged."""
    return [_run(artifacts, seed, evaluators) for seed in seeds]


def _run(artifacts: Path, seed: int, evaluators: list[str]) -> Run:
    def figures(stage: str, file: str, *keys: str) -> dict[str, Any]:
        return read_figures(artifacts / f"{stage}/{seed}/{file}", f"python -m stages.{stage} {seed}", keys)

    logged = artifacts / f"train/{seed}/live/plots/metrics"
    return Run(
        seed=seed,
        train=figures("train", "train.json", "start_s", "compile_s", "wall_s"),
        adapt=figures("adapt", "adapt.json", "adapt_s", "processes", "on_gpus"),
        quantize=figures("quantize", "quantize.json", "calibration_s", "quantize_s", "quantized_rows_bpb", "tensors"),
        compress=figures("compress", "compress.json", "pack_s", "trial_s"),
        size=figures("size_check", "size.json"),
        scores={name: _metrics(artifacts, seed, name) for name in evaluators},
        certificates={name: _certificate(artifacts, seed, name) for name in evaluators},
        curves={name: _curve(logged / f"{name}.tsv", name, f"python -m stages.train {seed}") for name in CURVES},
        profiles={name: _profile(artifacts, seed, name) for name in evaluators},
    )


def _made(artifacts: Path, stage: str, seed: int, evaluator: str, file: str) -> tuple[Path, str]:
    """A file of a stage that runs once for each evaluator, and the command that makes it."""
    return artifacts / f"{stage}/{seed}/{evaluator}/{file}", f"python -m stages.{stage} {seed} {evaluator}"


def _metrics(artifacts: Path, seed: int, evaluator: str) -> dict[str, Any]:
    path, made_by = _made(artifacts, "evaluate", seed, evaluator, "metrics.json")
    return read_figures(path, made_by, ("updates", "load_s", "eval_s", "processes", "on_gpus"))


def _certificate(artifacts: Path, seed: int, evaluator: str) -> Certificate:
    path, made_by = _made(artifacts, "certify", seed, evaluator, "certificate.json")
    return load_certificate(path, evaluator, made_by)


def load_certificate(path: Path, evaluator: str, made_by: str) -> Certificate:
    """Read a certificate.json. Raises UserError if it is missing, is not one, or belongs to another evaluator."""
    try:
        certificate = Certificate.model_validate_json(require_file(path, made_by).read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: not a certificate: {key}: {fault['msg']}; `{made_by}` makes it anew") from None
    if certificate.evaluator != evaluator:
        raise UserError(f"{path}: a certificate of {certificate.evaluator!r}, expected {evaluator!r}")
    return certificate


def _curve(path: Path, name: str, made_by: str) -> list[tuple[float, float]]:
    with require_file(path, made_by).open(newline="", encoding="utf-8") as file:
        try:
            return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a table of step and {name}; run `{made_by}` again") from None


def _profile(artifacts: Path, seed: int, evaluator: str) -> list[float]:
    path, made_by = _made(artifacts, "evaluate", seed, evaluator, "nats.npz")
    return profile(read_array(path, "nats", made_by))


# The number of parts of the stream over which means are taken: enough to show a course, few enough for steady means.
PARTS = 48


def profile(nats_N: np.ndarray) -> list[float]:
    """The mean loss in nats of each of PARTS equal parts of the stream, in order; nats (N,) float64 of its targets.

    Where there are fewer targets than PARTS, each is a part.
    """
    parts = min(PARTS, len(nats_N))
    bounds = np.linspace(0, len(nats_N), parts + 1).astype(np.int64)
    sums = np.add.reduceat(nats_N.astype(np.float64, copy=False), bounds[:-1])
    means: list[float] = (sums / np.diff(bounds)).tolist()
    return means


def share(part: int, parts: int) -> float:
    """Where the middle of a part of the stream lies, in percent of the stream."""
    return 100 * (part + 0.5) / parts


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
    def kind(self) -> str | None:
        """The kind of evaluator, None for one that TITLES does not know."""
        kinds = [kind for kind in TITLES if self.name == kind or self.name.startswith(f"{kind}_")]
        return max(kinds, key=len, default=None)

    @property
    def title(self) -> str:
        """What the evaluator is, in a few words."""
        return TITLES[self.kind] if self.kind else "an evaluator of your own"

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
