"""From model.bin to a network that can be evaluated. Whatever is evaluated comes through here."""

from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT
from stages.compress.container import unpack
from stages.errors import UserError
from stages.files import require_file
from stages.quantize.codes import dequantize


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
