"""From model.bin to a network that can be evaluated, and what model.bin weighs.

Whatever is evaluated comes through here. Unpacking can keep all processors busy for a while (lrzip), so that nothing
here unpacks a file twice, and weighing does not unpack it at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from fairway.codec.codes import dequantize
from fairway.codec.container import read_header, unpack
from fairway.codec.header import Group
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
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
    return _network(config, weights, device)


def load_artifact_once(path: Path, world: World) -> GPT:
    """load_artifact for all processes: rank 0 unpacks the file and gives the weights to the others.

    Raises UserError as load_artifact does, in rank 0; torchrun then ends the others.
    """
    model = load_artifact(path, world.device) if world.rank == 0 else None
    # The others wait here until rank 0 has found the file good, and then believe what its header says.
    world.gather(torch.zeros(1, device=world.device))
    if model is None:
        model = GPT(read_header(path.read_bytes()).model).to_device(world.device).eval()
    for weight in model.state_dict().values():
        # The sum of rank 0's weight and zeros.
        world.sum(weight if world.rank == 0 else weight.zero_()).wait()
    return model


def snapshot(model: GPT) -> Callable[[], GPT]:
    """A function that makes networks with the weights that `model` has now, whatever becomes of `model` later.

    The weights are kept as bytes, which Python lets nobody change. To a decoder that must know nothing but the artifact
    a network made of them is as good as one read from the file again, and it costs no second unpacking.
    """
    config, device = model.config, next(model.parameters()).device
    frozen = save({name: weight.cpu() for name, weight in model.state_dict().items()})
    return lambda: _network(config, load(frozen), device)


def _network(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> GPT:
    """The network with these weights, in evaluation mode."""
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

    A class lists its weights, bytes (codes and scales) and bits per weight; quantize.json has the entropy of every
    matrix, which these can be compared to. `parts` is one stacked bar: bytes by part, of which the sum is the total.
    `would_fit`: weights more, at the present bits per weight, and bytes of code, either of which fills the rest.
    All this stands in the file's header. Raises UserError if `model` is damaged.
    """
    header = read_header(model)
    classes = {group.kind: _weigh_group(group) for group in header.groups}
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


def _weigh_group(group: Group) -> dict[str, Any]:
    weights = sum(entry.values for entry in group.matrices)
    return {
        "weights": weights,
        "bytes": group.stream_bytes,
        "bits_per_weight": 8 * group.stream_bytes / weights,
    }
