"""Which parameters an adaptation may change.

Training with the weights that quantization will leave.

What PR #1150 and #1488 did when they adapted: their "late QAT" flag was set by then, and unlike in compiled training it
took effect (training/qat.py).

Parameters that are stored in bfloat16, trained with float32 gradients and moments.

The records update their bfloat16 tables in bfloat16 throughout, without a master copy. Their gradients then depend on
how many processes the rows are spread over. Here only the weight itself is rounded after every step, which is what
makes most updates of those tables vanish, in the records and here.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fairway.model.gpt import GPT, MATRICES, SIDE_MATRICES
from fairway.model.rounding import straight_through

Named = list[tuple[str, Parameter]]


def trainable(
    model: GPT, *, freeze_blocks: int, freeze: Literal["blocks", "vectors"], freeze_tokens: bool = False
) -> Named:
    """Turn requires_grad off in the first `freeze_blocks` blocks; the names and parameters of all the rest.

    "vectors" freezes no matrix of those blocks but only vectors, scalars and the (2, D) resid_mix: in records that keep
    all layers' matrices in banks, freezing a block by its name missed them. `freeze_tokens` freezes the token table.
    """
    blocks = tuple(f"layer{i}." for i in range(freeze_blocks))
    for name, parameter in model.named_parameters():
        in_bank = freeze == "vectors" and name.endswith(MATRICES)
        frozen = (name.startswith(blocks) and not in_bank) or (freeze_tokens and name == "embed.token")
        parameter.requires_grad_(not frozen)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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


class RoundedWeights:
    """The bfloat16 parameters of a model, from now on float32 tensors that hold bfloat16 values."""

    def __init__(self, model: GPT) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def round(self) -> None:
        """Bring them back to bfloat16 values, after a step."""
        for parameter in self.parameters:
            parameter.copy_(parameter.bfloat16())

    def store(self) -> None:
        """Store them as bfloat16 again."""
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()
