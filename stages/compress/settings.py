"""The part of params.yaml that travels inside train_gpt.py."""

from typing import Any, get_args

from pydantic import TypeAdapter

from stages.params import EvaluatorName, Params

# What decides the artifact; the section of the shipped evaluator joins them. Others must not: they would change the
# shipped bytes without changing the record.
SECTIONS = ("tokenize", "model", "train", "average", "adapt", "quantize", "compress")


def shipped_settings(params: Params, seed: int) -> dict[str, Any]:
    """JSON values: the seed, and by name the sections that the shipped program needs."""
    sections = params.model_dump(mode="json", include={*SECTIONS, params.compress.evaluator})
    return {"seed": seed, "sections": sections}


def unused_modules(params: Params) -> list[str]:
    """Modules that the shipped program need not carry: the evaluators that are not its own."""
    return [f"stages.evaluate.{name}" for name in get_args(EvaluatorName) if name != params.compress.evaluator]


def read_settings(settings: dict[str, Any]) -> tuple[Params, int]:
    """The inverse: Params of which only the shipped sections exist, and the seed. Raises ValidationError."""
    types: dict[str, Any] = {name: field.annotation for name, field in Params.model_fields.items()}
    sections = {name: TypeAdapter(types[name]).validate_python(value) for name, value in settings["sections"].items()}
    return Params.model_construct(**sections), settings["seed"]
