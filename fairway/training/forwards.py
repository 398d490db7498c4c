"""The forward passes of a training run, and the look at the validation stream that is taken with them.

The passes are made once before the first step: with the weights as they are or rounded (qat.py), and compiled or not.
validate() says how good the weights of a run under way are. It scores each row of the stream on its own, so that a
token sees the tokens before it in its row alone; the evaluators of fairway/evaluation let it see more and score better.

Legend: B rows, T tokens of a row.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairway.model.backends import compiled
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.tokens.loader import Batch, Segmenter
from fairway.tokens.validation import Validation
from fairway.training.qat import Rounded
from fairway.training.train_settings import TrainSettings

# forward(inputs_BT, targets_BT, *, segments, looped) is the mean loss of a micro-batch (0-d), as GPT.forward is.
Forward = Callable[..., Tensor]


class Forwards:
    """The forward pass of a network, and with train.qat the one with rounded matrices that replaces it late in the run.

    `plain` is a Forward; `rounded_at` returns the other one.
    """

    def __init__(self, model: GPT, settings: TrainSettings, device: torch.device) -> None:
        self.plain = compiled_forward(model) if settings.compile else model
        if settings.qat:
            self.rounding = Rounded(model, settings.qat, device)
            self.rounded = compiled_forward(self.rounding.forward) if settings.compile else self.rounding.forward

    def rounded_at(self, steps: int) -> Forward:
        """The forward pass with rounded matrices, as it is `steps` steps after rounding began. Only with train.qat."""
        self.rounding.harden(steps)
        return self.rounded


def compiled_forward(forward: Forward, backend: Any = "inductor") -> Forward:
    """The forward pass, compiled for fixed shapes; only the number of a packed row's bounds may vary."""
    graph = compiled(forward, backend=backend)

    def call(inputs_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None, looped: bool) -> Tensor:
        if segments is not None:
            torch._dynamo.mark_dynamic(segments, 0)
        loss: Tensor = graph(inputs_BT, targets_BT, segments=segments, looped=looped)
        return loss

    return call


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
    """Mean loss (nats per token) and bits per byte over all rows of `row` tokens, the same on every rank.

    Each rank scores its share of the rows, batch_tokens // row of them at a time. With `segment` the rows of a batch
    are joined to one packed row, in which documents do not see each other, as PR #1958 trains and validates. Sums are
    float64, so that the number of ranks changes the last digits at most.
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
