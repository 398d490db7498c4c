"""Evaluators by the name that params.yaml gives them, and what an evaluation reads.

An evaluator is one file: the module fairway/evaluation/<kind>.py defines a single subclass of Evaluator, whose field
`settings` is annotated with its class of settings. Its name in params.yaml is `<kind>`, or `<kind>_<suffix>` where one
kind is used several times with different settings: `sliding` and `sliding_512` are both of kind sliding. Of several
kinds that a name could be of, the longest counts. Nothing is listed in the code, so nothing but the file is to be
added; the price is that modules are imported by name, which the program that ships cannot do (whole_record.py).
"""

import hashlib
import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import get_type_hints

from fairway.codec.artifact import load_artifact_once
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, require_file, stage_sources_sha256
from fairway.tokens.validation import Validation, load_validation

PACKAGE = "fairway.evaluation"
# Names become part of the names of stages and folders: small letters, digits, and single underscores between them.
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def evaluator_class(name: str) -> type[Evaluator]:
    """The class of the evaluator of that name, say SlidingEvaluator of "sliding_512".

    Its __module__ and __name__ say where it stands. Raises UserError, listing the kinds, if there is no such evaluator.
    """
    found = _find_class(name)
    if found is None:
        raise UserError(f"{name}: no such evaluator; expected {evaluator_names()}")
    return found


def settings_class(name: str) -> type[EvaluatorSettings]:
    """The class that the section of that name is read as. Raises UserError as evaluator_class."""
    kind = evaluator_class(name)
    found = get_type_hints(kind)["settings"]
    if not (isinstance(found, type) and issubclass(found, EvaluatorSettings)):
        raise UserError(
            f"{kind.__module__}: {kind.__name__}.settings: expected an annotation with a subclass of EvaluatorSettings"
        )
    return found


def is_evaluator(name: str) -> bool:
    """Whether there is an evaluator of that name."""
    return _find_class(name) is not None


def evaluator_kinds() -> list[str]:
    """Every kind of evaluator, in alphabetical order."""
    package = import_module(PACKAGE)
    return sorted(module.name for module in iter_modules(package.__path__) if _class_of_kind(module.name))


def evaluator_names() -> str:
    """What an evaluator may be called, as the end of a message."""
    return f"one of {', '.join(evaluator_kinds())}, or one of these with a suffix, as in sliding_512"


def _find_class(name: str) -> type[Evaluator] | None:
    """The class of the longest kind that the name begins with."""
    if not NAME.fullmatch(name):
        return None
    words = name.split("_")
    kinds = ("_".join(words[:end]) for end in range(len(words), 0, -1))
    return next((found for kind in kinds if (found := _class_of_kind(kind))), None)


def _class_of_kind(kind: str) -> type[Evaluator] | None:
    """The one evaluator that the module of that name defines, or None if it defines none or is not there."""
    if find_spec(f"{PACKAGE}.{kind}") is None:
        return None
    module = import_module(f"{PACKAGE}.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Evaluator) and value.__module__ == module.__name__
    ]
    # The base class itself is no kind of evaluator.
    found = [value for value in found if value is not Evaluator]
    if len(found) > 1:
        names = ", ".join(value.__name__ for value in found)
        raise UserError(f"fairway/evaluation/{kind}.py defines several evaluators ({names}); expected one")
    return found[0] if found else None


def make_evaluator(name: str, settings: EvaluatorSettings, *, model: ModelConfig, processes: int) -> Evaluator:
    """The evaluator of that name with the settings of its section, to score `model` on so many processes.

    Raises UserError if there is no such evaluator, or if its settings do not fit.
    """
    try:
        settings.check(section=name, model=model, processes=processes)
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    return evaluator_class(name)(settings)


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


def evaluation_fingerprint(
    artifacts: Path, seed: int, name: str, settings: EvaluatorSettings, *, processes: int
) -> str:
    """SHA-256 over what decides an evaluation and its seconds.

    That is its code (dvc.yaml), the artifact, the tokens' meta.json, the evaluator and its section, and how many
    processes share the work.
    """
    evaluation = {
        "code": stage_sources_sha256("evaluate"),
        "model": file_sha256(artifacts / "compress" / str(seed) / "model.bin"),
        "tokens": file_sha256(artifacts / "tokens" / "meta.json"),
        "evaluator": name,
        "settings": settings.model_dump(),
        "processes": processes,
    }
    return hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest()
