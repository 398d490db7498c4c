"""Sums over lanes: how processes train one network together with the same result however many they are.

The work of a step is divided into lanes, which stand for the GPUs of a record. Lanes are dealt to the processes in
turn: process r of P has the lanes r, r + P, r + 2P, ... Each lane has one result, and the results are added up in the
order of the lanes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fairway.runtime.distributed import World


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
