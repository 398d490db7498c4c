"""What an experiment concludes, what conclusions amount to, and the condition that is no experiment: accounting.

Accounting is about an evaluation that has been made. Counted are bytes, seconds, the size of the artifact, and what a
decoder must be told beside the artifact and the code; and it is looked up what the artifact and the text were made
from. Weights that were trained or calibrated on the validation text already depend on what they are to predict, and no
test of the artifact alone can show it; but the stages that did it have written it down.
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
from fairway.runtime.settings import EVAL_S, TRACK_GPUS

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


def places_bits(places: int, chosen: int) -> float:
    """What it costs to tell which of so many places are the chosen ones: log2 of the binomial coefficient."""
    return (math.lgamma(places + 1) - math.lgamma(chosen + 1) - math.lgamma(places - chosen + 1)) / math.log(2)


def order_bits(things: int) -> float:
    """What it costs to tell an arbitrary order of so many things: log2 of their factorial."""
    return math.lgamma(things + 1) / math.log(2)


@dataclass(frozen=True)
class Provenance:
    """From adapt.json and quantize.json: what the weights were adapted and calibrated on, as those stages call it."""

    adapt_split: str
    adapt_epochs: int
    adapt_s: float
    adapt_processes: int
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
class Text:
    """From the tokens' meta.json: how many training documents are validation documents too, and bytes of validation.

    `counted_bytes` are those that its tokens stand for, `text_bytes` those of the text, None where it is not known.
    """

    repeated: int
    counted_bytes: int
    text_bytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """The score that a certificate is about: metrics.json, nats (N,) float64, and what it was made with."""

    metrics: dict[str, Any]
    nats_N: Tensor
    model_bytes: int
    provenance: Provenance
    text: Text


def accounting(evaluation: Evaluation, bytes_N: Tensor, told_N: Tensor, *, cap_bytes: int) -> Finding:
    """The finding on an evaluation and the bytes (N,) of all targets; model.bin may have cap_bytes.

    `told_N` (N,) bool marks the document starts that a decoder must be told before it begins. They need no code, since
    it knows them then; but their places do, and no score holds those.
    """
    metrics, nats_N, provenance = evaluation.metrics, evaluation.nats_N, evaluation.provenance
    text = evaluation.text
    bpb = float(nats_N.sum()) / (math.log(2) * int(bytes_N.sum()))
    told_bits = places_bits(len(told_N), int(told_N.sum()))
    told_bpb = (float(nats_N[~told_N].sum()) / math.log(2) + told_bits) / int(bytes_N.sum())
    eval_s = _at_most_s(metrics["eval_s"], metrics["processes"])
    if provenance.trained:
        eval_s += _at_most_s(provenance.adapt_s, provenance.adapt_processes)
    evidence = {
        "val_bpb": metrics["val_bpb"],
        "recounted_bpb": bpb,
        "bytes": int(bytes_N.sum()),
        "counted_bytes": metrics["bytes"],
        "targets": len(nats_N),
        "eval_s": round(eval_s, 3),
        "processes": metrics["processes"],
        "model_bytes": evaluation.model_bytes,
        "calibration": provenance.calibration,
        "adapt_split": provenance.adapt_split if provenance.adapt_epochs else None,
        "text_counted_bytes": text.counted_bytes,
        "text_bytes": text.text_bytes,
        "repeated_documents": text.repeated,
        "told_starts": int(told_N.sum()),
        "told_bits": round(told_bits),
        "told_bpb": told_bpb,
    }
    once = metrics["scored"] == metrics["targets"]
    if once and (metrics["bytes"] != evidence["bytes"] or not abs(bpb - metrics["val_bpb"]) <= 1e-9):
        return Finding("fail", "bytes or bits per byte are not what the text and the scores add up to", evidence)
    if not once and not abs(bpb - metrics["val_bpb"]) <= 1e-3:
        return Finding("fail", "bits per byte are not what the scores add up to", evidence)
    if text.text_bytes is not None and text.counted_bytes > text.text_bytes:
        why = (
            f"the tokens count {text.counted_bytes:,} bytes, but the validation text has {text.text_bytes:,}: the "
            "tokenizer folds it to more bytes, which makes bits per byte smaller than they are"
        )
        return Finding("fail", why, evidence)
    if evaluation.model_bytes > cap_bytes:
        return Finding("fail", f"model.bin alone has more than {cap_bytes} bytes", evidence)
    if told_bpb > bpb and told_N.any():
        why = (
            f"by itself the score is no code length: a decoder must also be told where {evidence['told_starts']:,} "
            f"documents start, which takes {told_bits:,.0f} bits that neither the artifact nor the score holds; with "
            f"them, and without the code of those starts, the score is {told_bpb:.5f} bits per byte, not {bpb:.5f}"
        )
        return Finding("fail", why, evidence)
    if text.repeated:
        why = f"{text.repeated:,} documents that were trained on are validation documents too, word for word"
        return Finding("unproven", why, evidence)
    if provenance.calibration == "text":
        return Finding("unproven", "calibrated on a text file, of which nothing is known", evidence)
    if eval_s > EVAL_S:
        why = f"by what it took here, {TRACK_GPUS} GPUs may need {eval_s:.0f} s, and {EVAL_S:.0f} s are allowed"
        return Finding("unproven", why, evidence)
    return Finding("pass", "bytes are those of the text, and the score is what they and the nats add up to", evidence)


def _at_most_s(seconds: float, processes: int) -> float:
    """What as many processes as the track has GPUs need at most, where so many `processes` took these seconds.

    Fewer processes are no faster than those, but more may be, by their number at best.
    """
    return seconds * max(processes / TRACK_GPUS, 1.0)


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
    metrics = read_figures(
        folder / "metrics.json", made_by, ("val_bpb", "targets", "scored", "bytes", "eval_s", "processes")
    )
    path = folder / "nats.npz"
    nats_N = torch.from_numpy(read_array(path, "nats", made_by))
    if len(nats_N) != targets or metrics["targets"] != targets:
        raise UserError(f"{path}: {len(nats_N)} targets, expected {targets} as in {artifacts / 'tokens'}")
    model_bytes = (artifacts / f"compress/{seed}/model.bin").stat().st_size
    keys = "repeated_train_documents", "val_bytes", "val_text_bytes"
    meta = read_figures(artifacts / "tokens/meta.json", "python -m stages.tokenize", keys)
    return Evaluation(metrics, nats_N, model_bytes, _provenance(artifacts, seed), Text(*(meta[key] for key in keys)))


def _provenance(artifacts: Path, seed: int) -> Provenance:
    keys = ("split", "epochs", "adapt_s", "processes")
    adapt = read_figures(artifacts / f"adapt/{seed}/adapt.json", f"python -m stages.adapt {seed}", keys)
    quantize = read_figures(
        artifacts / f"quantize/{seed}/quantize.json", f"python -m stages.quantize {seed}", ("calibration",)
    )
    return Provenance(
        adapt_split=adapt["split"],
        adapt_epochs=adapt["epochs"],
        adapt_s=adapt["adapt_s"],
        adapt_processes=adapt["processes"],
        calibration=quantize["calibration"],
    )
