"""From model.bin to a network that can be evaluated, and the bytes that count against the track's cap.

Every evaluation and every certificate gets its network here. Unpacking can take a while on all processors (lrzip), so
it is done once in a process group, and weighing a file does not unpack it at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from fairway.codec.codes import dequantize
from fairway.codec.container import Group, read_header, unpack
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.settings import CAP_BYTES, Section


class CompressSettings(Section):
    """How codes become bytes, and which program ships beside them."""

    codec: Literal["ans", "trellis_ans", "brotli", "brotli_shuffled", "zstd", "lzma", "lrzip"]
    # The evaluator that the shipped train_gpt.py runs.
    evaluator: str


def load_artifact(path: Path, device: torch.device) -> GPT:
    """The network in a model file, in evaluation mode on `device`.

    Raises UserError naming the file if it is damaged, or if its tensors are not those of its network.
    """
    data = path.read_bytes()
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
    # The others wait here until rank 0 has found the file good. Only then do they read its header, without checks.
    world.gather(torch.zeros(1, device=world.device)).read()
    if model is None:
        model = GPT(read_header(path.read_bytes()).model).to_device(world.device).eval()
    for weight in model.state_dict().values():
        world.share(weight)
    return model


def snapshot(model: GPT) -> Callable[[], GPT]:
    """A function that makes networks with the weights that `model` has now, whatever becomes of `model` later.

    A decoder must start from the artifact and know nothing else. A network made here serves it as well as one that is
    read from the file again, since the weights are kept as bytes, which Python lets nobody change; and the file need
    not be unpacked a second time.
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
    """Raise UserError unless these are the tensors of the network that the header describes.

    The network is laid out on the meta device, where it takes no memory: a malicious header can claim any size.
    """
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


class SizeCheckSettings(Section):
    """The cap on the bytes of code and model: the track's, or a lower one of one's own."""

    cap_bytes: int = Field(gt=0, le=CAP_BYTES)


def weigh(train_gpt: bytes, model: bytes, *, cap_bytes: int) -> dict[str, Any]:
    """Weigh the two files that ship: what size.json holds. Raises UserError if `model` is damaged.

    - `total_bytes`, `headroom_bytes` below the cap (negative if above it), and the bytes of each file;
    - `classes`: for each class of tensors its weights, the bytes of their codes and scales, and bits per weight, which
      can be compared with the entropy of every matrix in quantize.json;
    - `parts`: the same bytes as the parts of one stacked bar, which sum to the total;
    - `would_fit`: how many more weights, at the present bits per weight, or bytes of code would fill the headroom.

    Everything about model.bin is read from its header, so that nothing is unpacked.
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
    """One line that says by how much the files are too large, and which setting to lower."""
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
