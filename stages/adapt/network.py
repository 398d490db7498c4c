"""From averaged weights to a network."""

from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT
from stages.errors import UserError


def load_network(config: ModelConfig, weights: dict[str, Tensor], path: Path, device: torch.device) -> GPT:
    """The network of `config` on `device` with these weights. Raises UserError naming `path` if they are another's."""
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_fault = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: not weights of the network in params.yaml (model): {first_fault}") from None
    return model.to_device(device)
