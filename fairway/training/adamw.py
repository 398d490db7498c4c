"""AdamW for the token tables, vectors and scalars, with torch's fused kernel.

torch.optim.AdamW takes the gradients from the parameters' .grad, but here they lie in the buffers of gradients.py. It
also imports torch's compiler when it is made, which takes 1.3 s. Hence this class calls the kernel itself.

Method: arXiv:1711.05101. No parameter is exempt from weight decay, as in the records (training.md 2.11).
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adamw import adamw

from fairway.runtime.settings import Section
from fairway.training.gradients import Named


class AdamWSettings(Section):
    """AdamW's rates and decays for tables and for scalars (which here include vectors), and what both share."""

    table_lr: float = Field(ge=0)
    table_weight_decay: float = Field(ge=0)
    scalar_lr: float = Field(ge=0)
    scalar_weight_decay: float = Field(ge=0)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)


class AdamW:
    """AdamW over parameters that share a learning rate and a weight decay.

    Moments have the dtype of their parameter, as in the records: those of a bfloat16 table are bfloat16.
    """

    def __init__(self, members: Named, settings: AdamWSettings, *, lr: float, weight_decay: float) -> None:
        self.names = [name for name, _ in members]
        self.parameters: list[Tensor] = [p for _, p in members]
        self.settings, self.lr, self.weight_decay = settings, lr, weight_decay
        # The names are those of torch.optim. The fused kernel takes the number of steps as tensors on the device.
        self.moments = {
            "exp_avg": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            "exp_avg_sq": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            "step": [torch.zeros((), device=p.device) for p in self.parameters],
        }

    @torch.no_grad()
    def step(self, grads: list[Tensor], *, lr_scale: float) -> None:
        """Update every parameter with its gradient of the same shape and dtype; `grads` has the parameters' order."""
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
        """Set the moments and the number of steps back to zero."""
        for moments in self.moments.values():
            torch._foreach_zero_(moments)

    def named_tensors(self) -> dict[str, Tensor]:
        """The moments and numbers of steps by "<moment>/<parameter>", not copied."""
        return {
            f"{kind}/{name}": moment
            for kind, moments in self.moments.items()
            for name, moment in zip(self.names, moments, strict=True)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over the values of what named_tensors returned."""
        for name, moment in self.named_tensors().items():
            moment.copy_(tensors[name])
