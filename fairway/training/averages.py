"""Averages of the weights over a training run, and the choice of the weights that the next stage gets.

The averages are kept in float32 beside the weights:

- EMA, the exponential moving average: E <- beta E + (1 - beta) theta after every step, from the initial weights on,
  without bias correction, as in all four records.
- SWA, stochastic weight averaging (arXiv:1803.05407): the mean of the weights at every so many steps near the end.
  PR #1150, #1172 and #1488 collected it and threw it away (training.md 2.13); here the stage average can choose it.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from fairway.runtime.errors import UserError
from fairway.runtime.files import load_tensors
from fairway.runtime.settings import Section


class Ema:
    """The exponential moving average of some parameters, at one decay (beta above)."""

    def __init__(self, parameters: dict[str, Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        # Without copy=True the average of a float32 parameter would be the parameter itself.
        self.mean = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        live = [p.to(torch.float32) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.mean.values()), live, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """The average in each parameter's own dtype."""
        return {name: mean.to(self.parameters[name].dtype) for name, mean in self.mean.items()}


class SwaSettings(Section):
    """When SWA collects the weights: every so many steps, while the learning-rate multiplier is below a limit."""

    # The limit of the learning-rate multiplier.
    below_lr: float = Field(gt=0)
    every: int = Field(gt=0)


class Swa:
    """The mean of all weights collected so far: `count` of them. With a count of 0 there is no mean."""

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        self.parameters, self.count = parameters, 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Take the parameters as they are now into the mean."""
        self.count += 1
        if not self.mean:
            self.mean = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
            return
        live = [p.to(torch.float32) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.mean.values()), live, 1 / self.count)

    def weights(self) -> dict[str, Tensor]:
        """The mean in each parameter's own dtype; an empty mapping if nothing was collected."""
        return {name: mean.to(self.parameters[name].dtype) for name, mean in self.mean.items()}


class AverageSettings(Section):
    """Which of the weights that training kept go on to the next stage."""

    method: Literal["ema", "swa", "last"]
    ema_decay: float = Field(gt=0, lt=1)

    @property
    def kind(self) -> str:
        """What training calls the chosen weights: "last", "ema_<decay>" or "swa"."""
        return f"ema_{self.ema_decay}" if self.method == "ema" else self.method


def kept_weights(folder: Path, settings: AverageSettings, *, made_by: str) -> dict[str, Tensor]:
    """The chosen weights of the training run in `folder`, by name, in the dtypes of training.

    Raises UserError if that run did not keep them, or if it did not take place; `made_by` is the command for it.
    """
    path = folder / f"{settings.kind}.safetensors"
    if not path.is_file() and (folder / "last.safetensors").is_file():
        kept = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors")))
        raise UserError(f"params.yaml: average.method: {settings.method} needs {path}; training kept only {kept}")
    return load_tensors(path, made_by)
