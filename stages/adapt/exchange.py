"""What processes that train one network tell each other: sums, in one flat message each."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from stages.distributed import World


def sum_over_ranks(tensors: Sequence[Tensor], world: World) -> None:
    """Replace every tensor by its sum over the processes, added up in float32."""
    if world.size == 1:
        return
    flat = world.sum(torch.cat([tensor.float().flatten() for tensor in tensors])).wait()
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def sum_gradients(parameters: Sequence[Parameter], world: World) -> None:
    """Replace every gradient by its sum over the processes; a process without a gradient has added nothing."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_over_ranks([parameter.grad for parameter in parameters if parameter.grad is not None], world)
