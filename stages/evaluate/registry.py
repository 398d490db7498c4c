"""Evaluators by the name that params.yaml gives them."""

from collections.abc import Callable
from typing import Any

from stages.errors import UserError
from stages.evaluate.evaluator import Evaluator
from stages.evaluate.lora_ttt import LoraTttEvaluator
from stages.evaluate.sliding import SlidingEvaluator
from stages.evaluate.slot import SlotEvaluator
from stages.evaluate.streaming import StreamingEvaluator
from stages.evaluate.ttt import TttEvaluator
from stages.params import Params

# Each takes the section of params.yaml that has its name.
EVALUATORS: dict[str, Callable[[Any], Evaluator]] = {
    "sliding": SlidingEvaluator,
    "ttt": TttEvaluator,
    "slot": SlotEvaluator,
    "streaming": StreamingEvaluator,
    "lora_ttt": LoraTttEvaluator,
}


def make_evaluator(name: str, params: Params) -> Evaluator:
    """The evaluator of that name with its section's settings. Reads no other section of `params`.

    Raises UserError if there is no such evaluator or no such section.
    """
    if name not in EVALUATORS:
        raise UserError(f"{name}: no such evaluator; expected one of {', '.join(EVALUATORS)}")
    settings = getattr(params, name)
    if settings is None:
        raise UserError(f"params.yaml: {name}: missing section, which the evaluator of that name needs")
    return EVALUATORS[name](settings)
