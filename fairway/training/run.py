"""A training run: its forward passes, and its state between two steps.

The forward passes are made once before the first step: with the weights as they are or rounded (qat.py), and compiled
or not. The state is all that changes while the run goes on, to be saved and restored as one.

Legend: B rows, T tokens of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairway.model.backends import compiled
from fairway.model.gpt import GPT, param_groups
from fairway.runtime.distributed import World
from fairway.runtime.progress import Figures
from fairway.tokens.loader import Prefetcher
from fairway.training.averages import Ema, Swa
from fairway.training.optimizer import Optimizer, under
from fairway.training.qat import Rounded
from fairway.training.schedule import Budget, Moment, TrainSettings, forecast, run_budget

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


START = Moment(0, 0.0)


@dataclass
class Run:
    """A training run. Its settings, budget and world stay the same; all its other parts change from step to step.

    `emas` are by name ("ema_<decay>"), `step` is the number of steps that the device was given, `known` an earlier
    moment by a reading of rank 0's clock, and `history` holds every logged step with its figures.
    """

    settings: TrainSettings
    budget: Budget
    world: World
    model: GPT
    forwards: Forwards
    optimizer: Optimizer
    emas: dict[str, Ema]
    swa: Swa
    loader: Prefetcher
    step: int = 0
    known: Moment = START
    # The index of the first step with rounded matrices, None before that step.
    rounded_from: int | None = None
    history: list[tuple[int, Figures]] = field(default_factory=list)

    @classmethod
    def begin(cls, model: GPT, loader: Prefetcher, settings: TrainSettings, world: World) -> "Run":
        """A run before its first step; the initial weights are those that `model` has."""
        named = dict(model.named_parameters())
        groups = param_groups(model, side_matrices=settings.muon.side_matrices)
        assert sum(map(len, groups.values())) == len(named), "every parameter is stepped by exactly one optimizer"
        return cls(
            settings=settings,
            budget=run_budget(settings),
            world=world,
            model=model,
            forwards=Forwards(model, settings, world.device),
            optimizer=Optimizer(groups, settings, world),
            emas={f"ema_{decay}": Ema(named, decay) for decay in settings.ema_decays},
            swa=Swa(named),
            loader=loader,
        )

    @property
    def now(self) -> Moment:
        """Where the run stands when the device has done all steps that it was given."""
        return forecast(self.known, self.step)

    def average(self, lr_scale: float) -> None:
        """Take the weights into the averages after step `self.step`, whose learning-rate multiplier was lr_scale."""
        for ema in self.emas.values():
            ema.update()
        swa = self.settings.swa
        if lr_scale < swa.below_lr and self.step % swa.every == 0:
            self.swa.collect()

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Set the network's parameters to these values, given by name."""
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the weights by kind and name. Kinds are "last", "ema_<decay>", and "swa" if any were collected."""
        last = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        kinds = {"last": last} | {kind: ema.weights() for kind, ema in self.emas.items()}
        return kinds | ({"swa": self.swa.weights()} if self.swa.count else {})

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors of a resume point. Every rank must call this, since Muon's momentum is gathered from them."""
        kinds: dict[str, dict[str, Tensor]] = {"model": dict(self.model.named_parameters())}
        kinds |= {kind: ema.mean for kind, ema in self.emas.items()} | {"swa": self.swa.mean}
        named = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
        return named | self.optimizer.named_tensors()

    def bookmark(self) -> dict[str, Any]:
        """The rest of a resume point: what is no tensor, fit for JSON."""
        return {
            "step": self.step,
            "clock_s": self.now.clock_s,
            "loader": self.loader.state_dict(),
            "swa": self.swa.count,
            "rounded_from": self.rounded_from,
            "history": self.history,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go to the resume point that named_tensors and bookmark described. The number of ranks may have changed."""
        self.load_weights(under("model", tensors))
        for kind, ema in self.emas.items():
            for name, value in under(kind, tensors).items():
                ema.mean[name].copy_(value)
        swa = under("swa", tensors)
        # The mean must be in the order of the parameters, since Swa pairs them by position. The file has another order.
        self.swa.mean = {name: swa[name].to(self.world.device) for name in self.swa.parameters if swa}
        self.swa.count = state["swa"]
        self.optimizer.load_tensors(tensors)
        self.loader.load_state_dict(state["loader"])
        self.history = [(step, figures) for step, figures in state["history"]]
        self.rounded_from = state["rounded_from"]
        self.step = state["step"]
        self.known = Moment(self.step, state["clock_s"])
