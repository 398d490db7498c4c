"""The part of params.yaml that travels inside train_gpt.py, and what it chooses of the code."""

from stages.params import Params

# What decides the artifact; the section of the shipped evaluator joins them. Others must not: they would change the
# shipped bytes without changing the record.
SECTIONS = ("tokenize", "model", "train", "average", "adapt", "quantize", "compress")


def shipped_params(params: Params) -> Params:
    """Params of which only those sections exist that the shipped program needs."""
    return Params.model_construct(**{name: getattr(params, name) for name in (*SECTIONS, params.compress.evaluator)})


def chosen_options(params: Params) -> dict[str, str]:
    """Tables of the program in which the settings look up a single entry, with its key: no other ships."""
    return {
        "stages.compress.codecs.CODECS": params.compress.codec,
        "stages.evaluate.registry.EVALUATORS": params.compress.evaluator,
        "stages.train.inputs.ORDERS": params.train.loader.kind,
    }
