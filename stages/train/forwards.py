"""The forward passes of a run, chosen once before its first step: plain or rounded, eager or compiled."""

from typing import Any

import torch
from torch import Tensor

from model.compiler import compiled
from model.gpt import GPT
from stages import params
from stages.train.qat import Rounded
from stages.train.validate import Forward


class Forwards:
    """The network, and the one with rounded matrices that takes its place late in the run if train.qat says so."""

    def __init__(self, model: GPT, settings: params.Train, device: torch.device) -> None:
        self.plain = compiled_forward(model) if settings.compile else model
        if settings.qat:
            self.rounding = Rounded(model, settings.qat, device)
            self.rounded = compiled_forward(self.rounding.forward) if settings.compile else self.rounding.forward

    def rounded_at(self, steps: int) -> Forward:
        """The rounded network, as hard as it is `steps` steps after its first, if train.qat is set."""
        self.rounding.harden(steps)
        return self.rounded


def compiled_forward(forward: Forward, backend: Any = "inductor") -> Forward:
    """A forward pass compiled for fixed shapes, except that the number of a packed row's bounds may vary."""
    graph = compiled(forward, backend=backend)

    def call(inputs_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None, looped: bool) -> Tensor:
        if segments is not None:
            torch._dynamo.mark_dynamic(segments, 0)
        loss: Tensor = graph(inputs_BT, targets_BT, segments=segments, looped=looped)
        return loss

    return call
