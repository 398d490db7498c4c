"""What an evaluation reads: the compressed artifact and the validation stream, and that they belong together."""

import hashlib
import json
from pathlib import Path

import torch

from model.gpt import GPT
from stages.compress.artifact import load_artifact
from stages.errors import UserError
from stages.files import require_file
from stages.params import Params
from stages.sources import stage_sources_sha256
from stages.tokenize.shards import file_sha256
from stages.tokenize.validation import Validation, load_validation


def load_inputs(artifacts: Path, seed: int, device: torch.device) -> tuple[GPT, Validation]:
    """The network in compress/<seed>/model.bin, on `device`, and the stream in tokens/, cut to its row length (CPU).

    Raises UserError if either is missing or damaged, or if they were made for different vocabularies.
    """
    path, meta_path = artifacts / "compress" / str(seed) / "model.bin", artifacts / "tokens" / "meta.json"
    require_file(path, f"python -m stages.compress {seed}")
    meta = json.loads(require_file(meta_path, "python -m stages.tokenize").read_text(encoding="utf-8"))
    model = load_artifact(path, device)
    if meta["vocab_size"] != model.config.vocab_size:
        raise UserError(
            f"{path}: a network for {model.config.vocab_size} tokens, expected {meta['vocab_size']} as in {meta_path}"
        )
    config = model.config
    return model, load_validation(artifacts / "tokens", seq_len=config.seq_len, vocab_size=config.vocab_size)


def fingerprint(artifacts: Path, seed: int, name: str, params: Params) -> str:
    """SHA-256 over what decides an evaluation: its code (dvc.yaml), the artifact, the tokens' meta.json, the
    evaluator and its section."""
    evaluation = {
        "code": stage_sources_sha256("evaluate"),
        "model": file_sha256(artifacts / "compress" / str(seed) / "model.bin"),
        "tokens": file_sha256(artifacts / "tokens" / "meta.json"),
        "evaluator": name,
        "settings": getattr(params, name).model_dump(),
    }
    return hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest()
