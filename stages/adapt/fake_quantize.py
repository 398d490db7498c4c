"""Weights that are rounded to 6 bits in the forward pass while their masters keep full precision.

What PR #1150 and #1488 trained with when they adapted: their "late QAT" flag was set by then, and unlike in compiled
training it took effect. Rows are scaled to ±31, never as if their largest weight were below 1.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from model.gpt import GPT, MATRICES, SIDE_MATRICES

Loss = Callable[[Tensor, Tensor], Tensor]


def fake_quantized(weight: Tensor) -> Tensor:
    """A matrix (rows, columns) rounded to 6 bits per row; its gradient passes straight through to `weight`."""
    scale = (weight.detach().abs().amax(1, keepdim=True) / 31).clamp(min=1 / 31)
    rounded = (weight.detach() / scale).round().clamp(-32, 31) * scale
    return weight + (rounded - weight).detach()


def loss_with(model: GPT, matrices: Literal["none", "side", "all"]) -> Loss:
    """The model's loss of inputs (R, T) and targets (R, T) with the named matrices fake-quantized.

    "side" are the projections of the bigram and value tables, "all" the layers' matrices as well.
    """
    endings = {"none": (), "side": SIDE_MATRICES, "all": MATRICES + SIDE_MATRICES}[matrices]
    names = [name for name, _ in model.named_parameters() if name.endswith(endings)]
    if not names:
        return model

    def loss(inputs_RT: Tensor, targets_RT: Tensor) -> Tensor:
        rounded = {name: fake_quantized(model.get_parameter(name)) for name in names}
        value: Tensor = torch.func.functional_call(model, rounded, (inputs_RT, targets_RT))
        return value

    return loss
