"""Quantization-aware training: the network as it will be once its matrices are rounded to a few bits per weight.

Legend: W a matrix (O, I), s its row scales (O, 1), z = W / s, n the largest code, 2^(bits-1) - 1.

    ste     W + stopgrad(clamp(round(z), -n-1, n) s - W)                   gradient as if not rounded (PR #1150, #1488)
    soft    clamp(floor(z) + sigmoid(a (z - floor(z) - 1/2)), -n, n) s     differentiated as is, a from 1 to 16 (#1172)

In the published programs the switch was a class attribute that torch.compile folds into its graph, so it never took
effect while training. Here the rounded network is a function of its own, compiled apart, and `a` is an input.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairway.model.gpt import GPT, param_groups
from fairway.model.rounding import soft_round, straight_through
from fairway.runtime.settings import Section


class QatSettings(Section):
    """Quantization-aware training: matrices are rounded in the forward pass, late in the run (training/qat.py)."""

    # "ste": rounded, gradient straight through (PR #1150, #1488). "soft": a sigmoid that hardens (PR #1172).
    kind: Literal["ste", "soft"]
    bits: int = Field(ge=4, le=8)
    # Rows are never scaled as if their largest weight were below this; records: 1.0.
    min_clip: float = Field(ge=0)
    # From the first step whose learning-rate multiplier is below this, but not before min_step.
    below_lr: float = Field(gt=0)
    min_step: int = Field(ge=0)
    # Steps over which "soft" hardens.
    ramp_steps: int = Field(gt=0)


def rounding_begins(settings: QatSettings, step: int, lr_scale: float) -> bool:
    """Whether it may begin at the step with that 0-based index and learning-rate multiplier."""
    return step >= settings.min_step and lr_scale < settings.below_lr


class Rounded:
    """A network whose matrices, those of the bigram and value tables included, are rounded before every use."""

    def __init__(self, model: GPT, settings: QatSettings, device: torch.device) -> None:
        self.model, self.settings = model, settings
        self.names = [name for name, _ in param_groups(model, side_matrices=True)["matrix"]]
        # A tensor, so that compiled code reads it anew at every step.
        self.sharpness = torch.ones((), device=device)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None, looped: bool) -> Tensor:
        """As model.GPT's."""
        rounded = {name: self._round(self.model.get_parameter(name)) for name in self.names}
        keywords = {"segments": segments, "looped": looped}
        loss: Tensor = torch.func.functional_call(self.model, rounded, (inputs_BT, targets_BT), keywords)
        return loss

    def _round(self, W: Tensor) -> Tensor:
        bits, min_clip = self.settings.bits, self.settings.min_clip
        if self.settings.kind == "ste":
            return straight_through(W, bits=bits, min_clip=min_clip)
        return soft_round(W, self.sharpness, bits=bits, min_clip=min_clip)

    def harden(self, steps: int) -> None:
        """Set the sharpness of a step, `steps` steps after the first rounded one."""
        self.sharpness.fill_(1 + 15 * min(steps / self.settings.ramp_steps, 1.0))
