"""What changes while a run goes on: learning rate, momentum, depth. All pure functions of where the run stands.

A run has up to two budgets, steps and seconds of training clock; the nearer one counts. With seconds, "the last W
steps" are estimated from the mean time of a step so far, as PR #1150, #1172 and #1488 do; PR #1958 decays over a share
of the budget, down to a floor.

The training clock: seconds of training, standing still while something else is measured.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from fairway.runtime.distributed import World
from fairway.runtime.settings import Section
from fairway.training.muon import MuonSettings


class ScheduleSettings(Section):
    """Learning-rate multiplier: 1, then linear to `floor` (training/schedule.py)."""

    # "steps": over the last `warmdown` steps; "fraction": over the last `warmdown` share of the budget.
    warmdown_unit: Literal["steps", "fraction"]
    warmdown: float = Field(gt=0)
    floor: float = Field(ge=0, lt=1)
    # Share of the run after which model.loop is applied; null applies it from the start.
    loop_from: float | None = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _fraction(self) -> "ScheduleSettings":
        if self.warmdown_unit == "fraction" and self.warmdown > 1:
            raise ValueError(f"warmdown ({self.warmdown}) is a share of the run: expected 0 to 1")
        return self


@dataclass(frozen=True)
class Moment:
    """Where a run stands before a step: steps done, and seconds on the training clock (rank 0's, on every rank)."""

    step: int
    clock_s: float


@dataclass(frozen=True)
class Budget:
    """How long a run may go on. clock_s is None where only steps count."""

    steps: int
    clock_s: float | None

    def fraction(self, now: Moment) -> float:
        """Share of the run that is over, 0 to 1."""
        by_steps = now.step / self.steps
        return by_steps if self.clock_s is None else max(by_steps, now.clock_s / self.clock_s)

    def steps_left(self, now: Moment) -> float:
        """Steps that remain: counted, or estimated from the mean time of a step if seconds run out first."""
        left = float(self.steps - now.step)
        if self.clock_s is None:
            return left
        step_s = now.clock_s / max(now.step, 1)
        return min(left, max(self.clock_s - now.clock_s, 0.0) / step_s) if step_s > 0 else left

    def spent(self, now: Moment) -> str | None:
        """What stops the run here, "steps" or "wallclock"; None if it goes on."""
        if now.step >= self.steps:
            return "steps"
        return "wallclock" if self.clock_s is not None and now.clock_s >= self.clock_s else None


def lr_multiplier(schedule: ScheduleSettings, budget: Budget, now: Moment) -> float:
    """What every base learning rate is multiplied by in the step that begins now: 1, then linear down to the floor."""
    if schedule.warmdown_unit == "steps":
        left = budget.steps_left(now) / schedule.warmdown
    else:
        left = (1 - budget.fraction(now)) / schedule.warmdown
    return min(1.0, max(left, schedule.floor))


def muon_momentum(muon: MuonSettings, step: int) -> float:
    """Momentum of the step with that 0-based index: linear from momentum_start to momentum, then constant."""
    risen = min(step / muon.momentum_warmup_steps, 1.0) if muon.momentum_warmup_steps else 1.0
    return (1 - risen) * muon.momentum_start + risen * muon.momentum


def loop_is_on(schedule: ScheduleSettings, budget: Budget, now: Moment) -> bool:
    """Whether the step that begins now applies model.loop (PR #1855: from 35 % of the clock on)."""
    return schedule.loop_from is None or budget.fraction(now) >= schedule.loop_from


class Clock:
    """Runs from start() on, except inside paused(); the device is waited for on both sides of a pause."""

    def __init__(self, world: World, elapsed_s: float = 0.0) -> None:
        self.world, self.elapsed_s = world, elapsed_s
        self.running_since: float | None = None

    def start(self) -> None:
        """Let it run."""
        self.world.synchronize()
        self.running_since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far, as the host sees them: the device may lag behind."""
        return self.elapsed_s + (time.perf_counter() - self.running_since if self.running_since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block."""
        self.world.synchronize()
        self.elapsed_s, self.running_since = self.read(), None
        yield
        self.start()
