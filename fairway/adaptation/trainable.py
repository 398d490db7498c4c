"""What adaptation may change in a network, with which weights it runs, and how processes share the work.

All training that goes on after training uses this: adapt, TTT and LoRA TTT. They train bfloat16 parameters in a way of
their own (RoundedWeights).

Processes train one network together with the same result however many they are. For that, the work of a step is divided
into lanes, which stand for the GPUs of a record. Lanes are dealt to the processes in turn: process r of P has the lanes
r, r + P, r + 2P, ... Each lane has one result, and the results are added up in the order of the lanes.

Legend: R rows, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fairway.model.gpt import GPT, MATRICES, SIDE_MATRICES
from fairway.model.precision import straight_through
from fairway.runtime.distributed import World

Named = list[tuple[str, Parameter]]


def trainable(
    model: GPT, *, freeze_blocks: int, freeze: Literal["blocks", "vectors"], freeze_tokens: bool = False
) -> Named:
    """Freeze the first `freeze_blocks` blocks; the names and parameters of all that is not frozen.

    "blocks" freezes everything in those blocks, "vectors" everything but the matrices: in records that keep all layers'
    matrices in banks, freezing a block by its name missed them. `freeze_tokens` freezes the token table too.
    """
    blocks = tuple(f"layer{i}." for i in range(freeze_blocks))
    for name, parameter in model.named_parameters():
        in_bank = freeze == "vectors" and name.endswith(MATRICES)
        frozen = (name.startswith(blocks) and not in_bank) or (freeze_tokens and name == "embed.token")
        parameter.requires_grad_(not frozen)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


# Of inputs and targets (R, T), and, where documents are kept apart, their segments (GPT.forward).
Loss = Callable[..., Tensor]


def loss_with(model: GPT, matrices: Literal["none", "side", "all"]) -> Loss:
    """The model's loss with some matrices rounded to 6 bits, as quantization will.

    Gradients pass the rounding unchanged. "side" rounds the projections of the bigram and value tables, "all" the
    layers' matrices as well. PR #1150 and #1488 did this when they adapted: their flag for quantization-aware training
    was set by then, and took effect, which it never had in compiled training (training/qat.py).
    """
    endings = {"none": (), "side": SIDE_MATRICES, "all": MATRICES + SIDE_MATRICES}[matrices]
    names = [name for name, _ in model.named_parameters() if name.endswith(endings)]
    if not names:
        return model

    def loss(inputs_RT: Tensor, targets_RT: Tensor, **kept_apart: Tensor | None) -> Tensor:
        # As in the records, a row is scaled as if its largest weight were at least 1; most rows have smaller ones.
        rounded = {name: straight_through(model.get_parameter(name), bits=6, min_clip=1.0) for name in names}
        value: Tensor = torch.func.functional_call(model, rounded, (inputs_RT, targets_RT), kept_apart)
        return value

    return loss


class RoundedWeights:
    """The bfloat16 parameters of a model, which become float32 tensors that hold bfloat16 values.

    The records update their bfloat16 tables in bfloat16 throughout, without a master copy. Gradients in bfloat16 depend
    on how many processes the rows are spread over. Here gradients and moments are float32, and only the weights are
    rounded, after every step; that makes most updates of those tables vanish, here as in the records.
    """

    def __init__(self, model: GPT) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def round(self) -> None:
        """Round the weights to bfloat16 values, after a step."""
        for parameter in self.parameters:
            parameter.copy_(parameter.bfloat16())

    def store(self) -> None:
        """Make them bfloat16 tensors again."""
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()


def sum_over_lanes(
    like: Sequence[Tensor], lanes: int, work: Callable[[int], Sequence[Tensor | None]], world: World
) -> list[Tensor]:
    """The sums over all lanes of what `work(lane)` returns, float32, shaped as `like`, on every process; None counts 0.

    They are added up in the order of the lanes, so that they are the same to the last bit for any number of processes.
    """
    sizes, each = [tensor.numel() for tensor in like], -(-lanes // world.size)
    mine = torch.zeros(each, sum(sizes), device=like[0].device)
    for row, lane in zip(mine, range(world.rank, lanes, world.size), strict=False):
        pairs = [(piece, x.detach()) for piece, x in zip(row.split(sizes), work(lane), strict=True) if x is not None]
        if pairs:
            torch._foreach_copy_([piece.view_as(x) for piece, x in pairs], [x for _, x in pairs])
    rows, total = world.stack(mine).wait(), torch.zeros_like(mine[0])
    for lane in range(lanes):
        total += rows[lane % world.size * each + lane // world.size]
    return [piece.view_as(tensor) for piece, tensor in zip(total.split(sizes), like, strict=True)]


def sum_gradients(
    parameters: Sequence[Parameter], lanes: int, gradients: Callable[[int], Sequence[Tensor | None]], world: World
) -> None:
    """Set the gradient of every parameter to the sum over all lanes of what `gradients(lane)` returns for it.

    Every process holds the gradients of all lanes at once, in float32: 0.9 GiB for 8 lanes and 27 million parameters.
    """
    for parameter, total in zip(parameters, sum_over_lanes(parameters, lanes, gradients, world), strict=True):
        parameter.grad = total.to(parameter.dtype)
