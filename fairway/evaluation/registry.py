"""Evaluators by the name that params.yaml gives them.

What an evaluation reads: the compressed artifact and the validation stream, and that they belong together.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairway.codec.artifact import load_artifact_once
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.lora_ttt import LoraTttEvaluator
from fairway.evaluation.sliding import SlidingEvaluator
from fairway.evaluation.slot import SlotEvaluator
from fairway.evaluation.streaming import StreamingEvaluator
from fairway.evaluation.ttt import TttEvaluator
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.files import require_file
from fairway.runtime.fingerprint import file_sha256, stage_sources_sha256
from fairway.runtime.settings import Section
from fairway.tokens.validation import Validation, load_validation

# Each takes the section of params.yaml that has its name.
EVALUATORS: dict[str, Callable[[Any], Evaluator]] = {
    "sliding": SlidingEvaluator,
    "ttt": TttEvaluator,
    "slot": SlotEvaluator,
    "streaming": StreamingEvaluator,
    "lora_ttt": LoraTttEvaluator,
}


def make_evaluator(name: str, settings: Section | None) -> Evaluator:
    """The evaluator of that name with the settings of its section in params.yaml.

    Raises UserError if there is no such evaluator or no such section.
    """
    if name not in EVALUATORS:
        raise UserError(f"{name}: no such evaluator; expected one of {', '.join(EVALUATORS)}")
    if settings is None:
        raise UserError(f"params.yaml: {name}: missing section, which the evaluator of that name needs")
    return EVALUATORS[name](settings)


def load_inputs(artifacts: Path, seed: int, world: World) -> tuple[GPT, Validation]:
    """The network in compress/<seed>/model.bin, on this process's device, and the stream in tokens/, cut to its row
    length, on the CPU. Of all processes only the first unpacks the network.

    Raises UserError if either is missing or damaged, or if they were made for different vocabularies.
    """
    path, meta_path = artifacts / "compress" / str(seed) / "model.bin", artifacts / "tokens" / "meta.json"
    require_file(path, f"python -m stages.compress {seed}")
    meta = json.loads(require_file(meta_path, "python -m stages.tokenize").read_text(encoding="utf-8"))
    model = load_artifact_once(path, world)
    if meta["vocab_size"] != model.config.vocab_size:
        raise UserError(
            f"{path}: a network for {model.config.vocab_size} tokens, expected {meta['vocab_size']} as in {meta_path}"
        )
    config = model.config
    return model, load_validation(artifacts / "tokens", seq_len=config.seq_len, vocab_size=config.vocab_size)


def evaluation_fingerprint(artifacts: Path, seed: int, name: str, settings: Section) -> str:
    """SHA-256 over what decides an evaluation: its code (dvc.yaml), the artifact, the tokens' meta.json, the
    evaluator and its section."""
    evaluation = {
        "code": stage_sources_sha256("evaluate"),
        "model": file_sha256(artifacts / "compress" / str(seed) / "model.bin"),
        "tokens": file_sha256(artifacts / "tokens" / "meta.json"),
        "evaluator": name,
        "settings": settings.model_dump(),
    }
    return hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest()
