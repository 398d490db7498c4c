"""Bits per byte of the validation stream in plain rows, with the weights as they are: a look at a run under way.

Each row is scored on its own, so a token sees at most its row. The evaluators of stages/evaluate do better.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.distributed import World
from stages.tokenize.validation import Validation

# forward(inputs_BT, targets_BT, *, segments, looped) -> mean loss, as model.GPT's.
Forward = Callable[..., Tensor]


@torch.no_grad()
def validate(
    forward: Forward, validation: Validation, world: World, *, row: int, batch_rows: int, looped: bool
) -> tuple[float, float]:
    """Mean loss (nats per token) and bits per byte over all whole rows; each rank scores its share of the rows.

    Sums are float64: the number of ranks shows in the last digits only.
    """
    targets = len(validation.bytes)
    first, last = (targets // row * rank // world.size for rank in (world.rank, world.rank + 1))
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    for begin in range(first, last, batch_rows):
        end = min(begin + batch_rows, last)
        span = validation.tokens[begin * row : end * row + 1].to(world.device)
        inputs, labels = span[:-1].view(-1, row), span[1:].clone().view(-1, row)
        nats += forward(inputs, labels, segments=None, looped=looped).double() * inputs.numel()
    total = float(world.sum(nats).wait())
    return total / targets, total / math.log(2) / int(validation.bytes.sum())
