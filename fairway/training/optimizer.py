"""One optimizer step: the gradients are exchanged and clipped, then AdamW and Muon update the parameters.

AdamW has the tables, vectors and scalars, Muon the matrices (training.md 2.10). While gradients or results travel
between ranks, the other parameters are updated. No parameter is exempt from weight decay, as in the records.
"""

import torch
from torch import Tensor

from fairway.runtime.distributed import World
from fairway.training.adamw import AdamW
from fairway.training.gradients import Gradients, Named, clip_factor
from fairway.training.muon import Muon
from fairway.training.schedule import TrainSettings


class Optimizer:
    """The gradients, Muon and AdamW of one network. Every rank has all parameters and a share of Muon's momentum."""

    def __init__(self, groups: dict[str, Named], settings: TrainSettings, world: World) -> None:
        micro_batches = settings.batch_tokens // settings.micro_batch_tokens
        self.settings, self.world = settings, world
        self.gradients = Gradients(groups, world, micro_batches=micro_batches)
        self.muon = Muon(self.gradients.stacks, settings.muon, world, compute_dtype=world.compute_dtype)
        adamw = settings.adamw
        self.adamw = {
            "table": AdamW(groups["table"], adamw, lr=adamw.table_lr, weight_decay=adamw.table_weight_decay),
            "scalar": AdamW(groups["scalar"], adamw, lr=adamw.scalar_lr, weight_decay=adamw.scalar_weight_decay),
        }

    def add_gradients(self) -> None:
        """Add the gradients that the backward pass of a micro-batch left in the parameters' .grad."""
        self.gradients.add(self.settings.grad_clip if self.settings.clip == "micro_batch" else None)

    @torch.no_grad()
    def step(self, *, lr_scale: float, momentum: float) -> Tensor | None:
        """Step every parameter with the gradients added since the last step.

        Returns the L2 norm of the step's gradient before clipping (0-d, on the device) where clip is "step". Elsewhere
        the step does not need it, and None is returned. The small exchange goes first, so that AdamW runs while the
        matrices' gradients are still under way.
        """
        small = self.world.sum(self.gradients.flat)
        self.muon.launch()
        flat = small.wait()
        norm = factor = None
        if self.settings.clip == "step":
            norm = self._step_norm(flat)
            factor = clip_factor(norm, self.settings.grad_clip)
            flat.mul_(factor)
        for group, adamw in self.adamw.items():
            adamw.step(self.gradients.of(group), lr_scale=lr_scale)
        self.muon.step(lr_scale=lr_scale, momentum=momentum, factor=factor)
        return norm

    def _step_norm(self, flat: Tensor) -> Tensor:
        """L2 norm of the mean gradient, whose matrices lie scattered over the ranks, while every rank has `flat`."""
        return (self.world.sum(self.muon.squared_norm()).wait() + flat.square().sum()).sqrt()

    def reset(self) -> None:
        """Set momentum and moments back to zero, as if no step had been taken."""
        for adamw in self.adamw.values():
            adamw.reset()
        torch._foreach_zero_(self.muon.momenta)

    def named_tensors(self) -> dict[str, Tensor]:
        """Momentum and moments by name, gathered from all ranks, so that every rank must call this."""
        tensors = {f"muon/{name}": momentum for name, momentum in self.muon.named_tensors().items()}
        for adamw in self.adamw.values():
            tensors |= {f"adamw/{name}": moment for name, moment in adamw.named_tensors().items()}
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what named_tensors returned. The number of ranks may differ from the one that saved it."""
        self.muon.load_tensors(under("muon", tensors))
        for adamw in self.adamw.values():
            adamw.load_tensors(under("adamw", tensors))


def under(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with "<kind>/", by the rest of their names."""
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}
