"""Bits per byte of the validation stream in plain rows, with the weights as they are: a look at a run under way.

Each row is scored on its own, so a token sees at most that much. The evaluators of stages/evaluate do better.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.distributed import World
from stages.tokenize.validation import Validation
from stages.train.loader import Batch, Segmenter

# forward(inputs_BT, targets_BT, *, segments, looped) -> mean loss, as model.GPT's.
Forward = Callable[..., Tensor]


@torch.no_grad()
def validate(
    forward: Forward,
    validation: Validation,
    world: World,
    *,
    row: int,
    batch_tokens: int,
    looped: bool,
    segment: Segmenter | None = None,
) -> tuple[float, float]:
    """Mean loss (nats per token) and bits per byte over all whole rows; each rank scores its share of the rows.

    With `segment` the rows of a batch form one packed row, in which documents do not see each other, as PR #1958 trains
    and validates. Sums are float64: the number of ranks shows in the last digits only.
    """
    batch_rows = batch_tokens // row
    targets = len(validation.bytes)
    first, last = (targets // row * rank // world.size for rank in (world.rank, world.rank + 1))
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    for begin in range(first, last, batch_rows):
        end = min(begin + batch_rows, last)
        span = validation.tokens[begin * row : end * row + 1]
        width = len(span) - 1 if segment else row
        bounds = torch.from_numpy(segment(span[:-1].numpy())) if segment else None
        inputs, labels, segments = Batch(span[:-1].view(-1, width), span[1:].view(-1, width), bounds).to(world.device)
        nats += forward(inputs, labels, segments=segments, looped=looped).double() * inputs.numel()
    total = float(world.sum(nats).wait())
    return total / targets, total / math.log(2) / int(validation.bytes.sum())
