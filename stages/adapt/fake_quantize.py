"""Training with the weights that quantization will leave.

What PR #1150 and #1488 did when they adapted: their "late QAT" flag was set by then, and unlike in compiled training it
took effect (train/qat.py).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from model.gpt import GPT, MATRICES, SIDE_MATRICES
from stages.train.qat import straight_through

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_with(model: GPT, matrices: Literal["none", "side", "all"]) -> Loss:
    """The model's loss of inputs (R, T) and targets (R, T) with some matrices rounded to 6 bits, straight through.

    "side" are the projections of the bigram and value tables, "all" the layers' matrices as well.
    """
    endings = {"none": (), "side": SIDE_MATRICES, "all": MATRICES + SIDE_MATRICES}[matrices]
    names = [name for name, _ in model.named_parameters() if name.endswith(endings)]
    if not names:
        return model

    def loss(inputs_RT: Tensor, targets_RT: Tensor) -> Tensor:
        # Rows are never scaled as if their largest weight were below 1, which sets the step of most of them.
        rounded = {name: straight_through(model.get_parameter(name), bits=6, min_clip=1.0) for name in names}
        value: Tensor = torch.func.functional_call(model, rounded, (inputs_RT, targets_RT))
        return value

    return loss
