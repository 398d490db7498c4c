"""AdamW on a list of parameters whose gradients lie elsewhere. Method: arXiv:1711.05101, torch's fused kernel.

torch.optim.AdamW would do the same, but wants the gradients in .grad, and loads the whole compiler (1.3 s) to exist.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adamw import adamw

from fairway.runtime.settings import Section
from fairway.training.gradients import Named


class AdamWSettings(Section):
    """AdamWSettings on tables and on vectors and scalars."""

    table_lr: float = Field(ge=0)
    table_weight_decay: float = Field(ge=0)
    scalar_lr: float = Field(ge=0)
    scalar_weight_decay: float = Field(ge=0)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)


class AdamW:
    """Parameters with one learning rate and weight decay; moments have their parameter's dtype (as in the records)."""

    def __init__(self, members: Named, settings: AdamWSettings, *, lr: float, weight_decay: float) -> None:
        self.names = [name for name, _ in members]
        self.parameters: list[Tensor] = [p for _, p in members]
        self.settings, self.lr, self.weight_decay = settings, lr, weight_decay
        # Under the names that torch.optim gives them; the fused kernel wants its counts on the device.
        self.moments = {
            "exp_avg": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            "exp_avg_sq": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            "step": [torch.zeros((), device=p.device) for p in self.parameters],
        }

    @torch.no_grad()
    def step(self, grads: list[Tensor], *, lr_scale: float) -> None:
        """Step every parameter with its gradient (same shape and dtype)."""
        adamw(
            self.parameters,
            grads,
            self.moments["exp_avg"],
            self.moments["exp_avg_sq"],
            [],
            self.moments["step"],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            eps=self.settings.eps,
            lr=self.lr * lr_scale,
            weight_decay=self.weight_decay,
        )

    def reset(self) -> None:
        """Forget the moments."""
        for moments in self.moments.values():
            torch._foreach_zero_(moments)

    def named_tensors(self) -> dict[str, Tensor]:
        """Moments by "<moment>/<parameter>"."""
        return {
            f"{kind}/{name}": moment
            for kind, moments in self.moments.items()
            for name, moment in zip(self.names, moments, strict=True)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what named_tensors returned."""
        for name, moment in self.named_tensors().items():
            moment.copy_(tensors[name])
