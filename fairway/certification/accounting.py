"""What an experiment concludes, and what conclusions amount to.

What is counted: bytes, seconds, the size of the artifact; and what the artifact was made from.

Weights trained or calibrated on the validation text already depend on what they are to predict, and no test of the
artifact alone can show it; the stages that did it have written it down.

What a certificate is about: an evaluation that has been made, and where its artifact comes from.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.runtime.errors import UserError
from fairway.runtime.files import read_array, read_figures
from fairway.runtime.track import EVAL_S

Verdict = Literal["pass", "fail", "unproven"]


@dataclass(frozen=True)
class Finding:
    """One condition: the verdict, the reason in one sentence, and the numbers it rests on."""

    verdict: Verdict
    why: str
    evidence: dict[str, Any]


def certificate(name: str, findings: dict[str, Finding], certify_s: float) -> dict[str, Any]:
    """What certificate.json holds."""
    return {
        "evaluator": name,
        "legal": legal(findings.values()),
        "conditions": {condition: asdict(finding) for condition, finding in findings.items()},
        "certify_s": round(certify_s, 3),
    }


def legal(findings: Iterable[Finding]) -> bool | Literal["unproven"]:
    """True if every condition passes, False if one fails, "unproven" otherwise."""
    verdicts = {finding.verdict for finding in findings}
    if "fail" in verdicts:
        return False
    return "unproven" if "unproven" in verdicts else True


@dataclass(frozen=True)
class Provenance:
    """From adapt.json and quantize.json: what the weights were adapted and calibrated on, as those stages call it."""

    adapt_split: str
    adapt_epochs: int
    adapt_s: float
    calibration: str | None

    @property
    def trained(self) -> bool:
        """Whether the weights were trained on the validation text."""
        return self.adapt_epochs > 0 and self.adapt_split == "validation"

    @property
    def calibrated(self) -> bool:
        """Whether they were rounded with statistics of the validation text."""
        return self.calibration == "validation"


@dataclass(frozen=True)
class Evaluation:
    """The score that a certificate is about: metrics.json, nats (N,) float64, and what it was made with."""

    metrics: dict[str, Any]
    nats_N: Tensor
    model_bytes: int
    provenance: Provenance


def accounting(evaluation: Evaluation, bytes_N: Tensor, *, cap_bytes: int) -> Finding:
    """The finding on an evaluation and the bytes (N,) of all targets; model.bin may have cap_bytes."""
    metrics, nats_N, provenance = evaluation.metrics, evaluation.nats_N, evaluation.provenance
    bpb = float(nats_N.sum()) / (math.log(2) * int(bytes_N.sum()))
    eval_s = metrics["eval_s"] + (provenance.adapt_s if provenance.trained else 0.0)
    evidence = {
        "val_bpb": metrics["val_bpb"],
        "recounted_bpb": bpb,
        "bytes": int(bytes_N.sum()),
        "counted_bytes": metrics["bytes"],
        "targets": len(nats_N),
        "eval_s": round(eval_s, 3),
        "model_bytes": evaluation.model_bytes,
        "calibration": provenance.calibration,
        "adapt_split": provenance.adapt_split if provenance.adapt_epochs else None,
    }
    once = metrics["scored"] == metrics["targets"]
    if once and (metrics["bytes"] != evidence["bytes"] or not abs(bpb - metrics["val_bpb"]) <= 1e-9):
        return Finding("fail", "bytes or bits per byte are not what the text and the scores add up to", evidence)
    if not once and not abs(bpb - metrics["val_bpb"]) <= 1e-3:
        return Finding("fail", "bits per byte are not what the scores add up to", evidence)
    if evaluation.model_bytes > cap_bytes:
        return Finding("fail", f"model.bin alone has more than {cap_bytes} bytes", evidence)
    if provenance.calibration == "text":
        return Finding("unproven", "calibrated on a text file, of which nothing is known", evidence)
    if eval_s > EVAL_S:
        return Finding("unproven", f"it took {eval_s:.0f} s here, and {EVAL_S:.0f} s are allowed", evidence)
    return Finding("pass", "bytes are those of the text, and the score is what they and the nats add up to", evidence)


def with_provenance(findings: dict[str, Finding], provenance: Provenance) -> dict[str, Finding]:
    """What was found about the evaluator, unless the artifact itself has seen the text that it is scored on."""
    if provenance.trained:
        epochs = provenance.adapt_epochs
        why = f"the weights were trained on the validation text for {epochs} epochs before any of it was scored"
        blamed = ["causality", "score_first", "single_pass", "decoder"]
    elif provenance.calibrated:
        why = "the weights were rounded with statistics of the validation text before any of it was scored"
        blamed = ["causality", "score_first", "decoder"]
    else:
        return findings
    tainted = {name: replace(findings[name], verdict="fail", why=why) for name in blamed}
    return findings | tainted


def load_evaluation(artifacts: Path, seed: int, name: str, targets: int) -> Evaluation:
    """What evaluate wrote, and what adapt and quantize wrote down about the weights.

    Raises UserError if any of it is missing, damaged, or not of a stream of N `targets`.
    """
    folder, made_by = artifacts / f"evaluate/{seed}/{name}", f"python -m stages.evaluate {seed} {name}"
    metrics = read_figures(folder / "metrics.json", made_by, ("val_bpb", "targets", "scored", "bytes", "eval_s"))
    path = folder / "nats.npz"
    nats_N = torch.from_numpy(read_array(path, "nats", made_by))
    if len(nats_N) != targets or metrics["targets"] != targets:
        raise UserError(f"{path}: {len(nats_N)} targets, expected {targets} as in {artifacts / 'tokens'}")
    model_bytes = (artifacts / f"compress/{seed}/model.bin").stat().st_size
    return Evaluation(metrics, nats_N, model_bytes, _provenance(artifacts, seed))


def _provenance(artifacts: Path, seed: int) -> Provenance:
    adapt = read_figures(
        artifacts / f"adapt/{seed}/adapt.json", f"python -m stages.adapt {seed}", ("split", "epochs", "adapt_s")
    )
    quantize = read_figures(
        artifacts / f"quantize/{seed}/quantize.json", f"python -m stages.quantize {seed}", ("calibration",)
    )
    return Provenance(
        adapt_split=adapt["split"],
        adapt_epochs=adapt["epochs"],
        adapt_s=adapt["adapt_s"],
        calibration=quantize["calibration"],
    )
