"""From model.bin to a network that can be evaluated. Whatever is evaluated comes through here.

Where the bytes of a record are.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fairway.codec.codes import Quantized, QuantizedState, code_histogram, dequantize, entropy_bits
from fairway.codec.container import read_header, unpack
from fairway.codec.header import Group
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.errors import UserError
from fairway.runtime.files import require_file
from fairway.runtime.settings import Section


class CompressSettings(Section):
    """Codes to bytes, and the program that ships beside them."""

    codec: Literal["ans", "brotli", "brotli_shuffled", "zstd", "lzma", "lrzip"]
    # The evaluator that the shipped train_gpt.py runs.
    evaluator: str


class SizeCheckSettings(Section):
    """The track's cap."""

    cap_bytes: int = Field(gt=0)


def load_artifact(path: Path, device: torch.device) -> GPT:
    """The network in a model file, in evaluation mode on `device`.

    Raises UserError naming the file if it is missing or damaged, or if its tensors are not those of its network.
    """
    data = require_file(path, f"python -m stages.compress {path.parent.name}").read_bytes()
    try:
        config, state = unpack(data)
        weights = dequantize(state)
        _check_tensors(config, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model = GPT(config)
    model.load_state_dict(weights)
    return model.to_device(device).eval()


def _check_tensors(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raises UserError unless these are the network's tensors. Takes no memory for it: a header can claim any shape."""
    if config.layers > len(weights):
        raise UserError(f"{config.layers} layers in {len(weights)} tensors")
    try:
        with torch.device("meta"):
            expected = {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
    except RuntimeError:
        raise UserError("a network too large to describe") from None
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"tensor {name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}")


def weigh(train_gpt: bytes, model: bytes, *, cap_bytes: int) -> dict[str, Any]:
    """Bytes of the two files, of their sum and below the cap (negative: above); of model.bin also by class of tensor.

    A class lists its weights, bytes (codes and scales), bits per weight, and beside them what one histogram per matrix
    would need (order-0 entropy, bits per weight). `parts` is one stacked bar: bytes by part, of which the sum is the
    total. `would_fit`: weights more, at the present bits per weight, and bytes of code, either of which fills the rest.
    Raises UserError if `model` is damaged.
    """
    header = read_header(model)
    _, state = unpack(model)
    classes = {group.kind: _weigh_group(group, state) for group in header.groups}
    weights = sum(facts["weights"] for facts in classes.values()) + sum(entry.values for entry in header.floats)
    total = len(train_gpt) + len(model)
    parts = {kind: facts["bytes"] for kind, facts in classes.items()} | {"float16": header.floats_bytes}
    header_bytes = len(model) - sum(parts.values())
    bits_per_weight = 8 * len(model) / weights
    headroom = cap_bytes - total
    return {
        "total_bytes": total,
        "cap_bytes": cap_bytes,
        "headroom_bytes": headroom,
        "train_gpt_bytes": len(train_gpt),
        "model_bytes": len(model),
        "classes": classes,
        "float16": {
            "weights": sum(entry.values for entry in header.floats),
            "bytes": header.floats_bytes,
        },
        "header_bytes": header_bytes,
        "weights": weights,
        "bits_per_weight": bits_per_weight,
        "parts": parts | {"header": header_bytes, "train_gpt.py": len(train_gpt)},
        "would_fit": {"weights": int(8 * max(headroom, 0) / bits_per_weight), "code_bytes": max(headroom, 0)},
    }


def over_cap(size: dict[str, Any]) -> str:
    """What is too large and what to lower, in one line."""
    kind, facts = max(size["classes"].items(), key=lambda item: item[1]["bytes"], default=("mlp", {"bytes": 0}))
    return (
        f"{size['total_bytes']:,} bytes (train_gpt.py {size['train_gpt_bytes']:,} + model.bin {size['model_bytes']:,}) "
        f"exceed size_check.cap_bytes = {size['cap_bytes']:,} by {-size['headroom_bytes']:,}; "
        f"lower quantize.bits.{kind} ({facts['bytes']:,} bytes), raise quantize.min_clip, or train a smaller model"
    )


def _weigh_group(group: Group, state: QuantizedState) -> dict[str, Any]:
    weights = sum(entry.values for entry in group.matrices)
    return {
        "weights": weights,
        "bytes": group.stream_bytes,
        "bits_per_weight": 8 * group.stream_bytes / weights,
        "entropy_bits_per_weight": _entropy(group, state),
    }


def _entropy(group: Group, state: QuantizedState) -> float:
    """Mean over the group's weights of the order-0 entropy of their matrix."""
    bits = [(entry.values, entropy_bits(code_histogram(_matrix(state, entry.name).codes))) for entry in group.matrices]
    return sum(values * entropy for values, entropy in bits) / sum(values for values, _ in bits)


def _matrix(state: QuantizedState, name: str) -> Quantized:
    value = state[name]
    assert not isinstance(value, torch.Tensor), "groups hold matrices of codes"
    return value
