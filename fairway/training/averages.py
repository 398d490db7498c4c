"""Averages of the weights, kept in float32 beside them.

EMA: E <- beta E + (1 - beta) theta after every step, from the initial weights on, without bias correction (as in all
four records). SWA: the plain mean of the weights every so many steps near the end (arXiv:1803.05407); the records
collected it and threw it away, here `average` can choose it.

Which file of a training run holds the weights that go on.
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


class SwaSettings(Section):
    """Running mean of the weights near the end of training."""

    # Collect while the learning-rate multiplier is below this.
    below_lr: float = Field(gt=0)
    every: int = Field(gt=0)


class AverageSettings(Section):
    """Which of the weights that training kept go on."""

    method: Literal["ema", "swa", "last"]
    ema_decay: float = Field(gt=0, lt=1)

    @property
    def kind(self) -> str:
        """What training calls the chosen weights: "last", "ema_<decay>" or "swa"."""
        return f"ema_{self.ema_decay}" if self.method == "ema" else self.method


class Ema:
    """An exponential moving average of parameters, at one decay."""

    def __init__(self, parameters: dict[str, Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        # A copy also where a parameter is float32 already.
        self.mean = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        live = [p.to(torch.float32) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.mean.values()), live, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """The average in each parameter's own dtype."""
        return {name: mean.to(self.parameters[name].dtype) for name, mean in self.mean.items()}


class Swa:
    """The running mean of all weights collected so far; empty (count 0) until the first."""

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        self.parameters, self.count = parameters, 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Take in the parameters as they are now."""
        self.count += 1
        if not self.mean:
            self.mean = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
            return
        live = [p.to(torch.float32) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.mean.values()), live, 1 / self.count)

    def weights(self) -> dict[str, Tensor]:
        """The mean in each parameter's own dtype; empty if nothing was collected."""
        return {name: mean.to(self.parameters[name].dtype) for name, mean in self.mean.items()}


def kept_weights(folder: Path, settings: AverageSettings, *, made_by: str) -> dict[str, Tensor]:
    """The chosen weights by name, in the dtypes of training. Raises UserError if that run did not keep them."""
    path = folder / f"{settings.kind}.safetensors"
    if not path.is_file() and (folder / "last.safetensors").is_file():
        kept = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors")))
        raise UserError(f"params.yaml: average.method: {settings.method} needs {path}; training kept only {kept}")
    return load_tensors(path, made_by)
