"""What a certificate is about: an evaluation that has been made, and where its artifact comes from."""

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from stages.certify.accounting import Evaluation, Provenance
from stages.errors import UserError
from stages.files import require_file


def load_evaluation(artifacts: Path, seed: int, name: str, targets: int) -> Evaluation:
    """What evaluate wrote, and what adapt and quantize wrote down about the weights.

    Raises UserError if any of it is missing, damaged, or not of a stream of N `targets`.
    """
    folder, made_by = artifacts / f"evaluate/{seed}/{name}", f"python -m stages.evaluate {seed} {name}"
    metrics = read_figures(folder / "metrics.json", made_by, ("val_bpb", "targets", "scored", "bytes", "eval_s"))
    path = folder / "nats.npz"
    nats_N = torch.from_numpy(read_nats(path, made_by))
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


def read_figures(path: Path, made_by: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object that a stage wrote, with at least these keys.

    Raises UserError naming the command that makes it if it is missing, damaged, or lacks a key.
    """
    try:
        found = json.loads(require_file(path, made_by).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; run `{made_by}` again")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}: no {missing[0]}; run `{made_by}` again")
    return found


def read_nats(path: Path, made_by: str) -> np.ndarray:
    """The nats (N,) float64 that evaluate wrote. Raises UserError as read_figures does."""
    try:
        with require_file(path, made_by).open("rb") as file, np.load(file) as arrays:
            nats_N: np.ndarray = arrays["nats"]
            return nats_N
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        raise UserError(f"{path}: not the nats of an evaluation; run `{made_by}` again") from None
