"""Quantization-aware training: the forward pass of the network as it will be once its matrices are rounded.

The loss then counts what rounding costs, and training lowers it. A matrix W is replaced by

    ste     W + stopgrad(clamp(round(z), -n-1, n) s - W)                   PR #1150, #1488
    soft    clamp(floor(z) + sigmoid(a (z - floor(z) - 1/2)), -n, n) s     PR #1172

The gradient of "ste" (straight-through estimator) is that of W without rounding. "soft" is differentiated as it is
written; its sharpness a rises from 1 to 16, towards true rounding.

In the published programs the switch was a class attribute, which torch.compile takes for a constant of its graph, so
that rounding never took effect while training (training.md 2.13). Here the rounded network is a function of its own,
which is compiled apart, and a is an input of it.

Legend: O rows (outputs), I columns (inputs), W a matrix (O, I), s the scales of its rows (O, 1), z = W / s, n the
largest code, 2^(bits-1) - 1.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairway.model.gpt import GPT, param_groups
from fairway.model.precision import soft_round, straight_through
from fairway.runtime.settings import Section


class QatSettings(Section):
    """Quantization-aware training: when rounding begins, and how matrices are rounded."""

    # "ste" rounds and passes the gradient straight through. "soft" rounds by a sigmoid that becomes steeper.
    kind: Literal["ste", "soft"]
    bits: int = Field(ge=4, le=8)
    # The least magnitude that a row's largest code stands for, whatever the row's weights are. The records have 1.0.
    min_clip: float = Field(ge=0)
    # Rounding begins at the first step whose learning-rate multiplier is below this, but not before step min_step.
    below_lr: float = Field(gt=0)
    min_step: int = Field(ge=0)
    # The number of steps over which the sharpness of "soft" rises.
    ramp_steps: int = Field(gt=0)


def rounding_begins(settings: QatSettings, step: int, lr_scale: float) -> bool:
    """Whether rounding may begin at the step with this index, counted from 0, and this learning-rate multiplier."""
    return step >= settings.min_step and lr_scale < settings.below_lr


class Rounded:
    """A network whose matrices are rounded before every use; those of the bigram and value tables too."""

    def __init__(self, model: GPT, settings: QatSettings, device: torch.device) -> None:
        self.model, self.settings = model, settings
        self.names = [name for name, _ in param_groups(model, side_matrices=True)["matrix"]]
        # The sharpness a is a tensor and no number, so that compiled code reads it anew at every step.
        self.sharpness = torch.ones((), device=device)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None, looped: bool) -> Tensor:
        """As GPT.forward, with rounded matrices: the mean loss (0-d) of inputs and targets (B, T) int64."""
        rounded = {name: self._round(self.model.get_parameter(name)) for name in self.names}
        keywords = {"segments": segments, "looped": looped}
        loss: Tensor = torch.func.functional_call(self.model, rounded, (inputs_BT, targets_BT), keywords)
        return loss

    def _round(self, W: Tensor) -> Tensor:
        """What the forward pass uses in place of W (O, I)."""
        bits, min_clip = self.settings.bits, self.settings.min_clip
        if self.settings.kind == "ste":
            return straight_through(W, bits=bits, min_clip=min_clip)
        return soft_round(W, self.sharpness, bits=bits, min_clip=min_clip)

    def harden(self, steps: int) -> None:
        """Set the sharpness for the step that comes `steps` steps after the first rounded one."""
        self.sharpness.fill_(1 + 15 * min(steps / self.settings.ramp_steps, 1.0))
