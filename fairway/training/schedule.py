"""What is settled about a training run before it begins: its settings, its budget and clock, and its schedules.

The section `train` of params.yaml is put together from the settings of the parts of training.

Learning rate, momentum and depth change while a run goes on, and each schedule is a function of where the run stands. A
run is limited by steps, and may also be limited by seconds of the training clock; the limit that is nearer counts.
Rates fall either over the last so many steps, whose number is estimated from the mean time of a step so far where
seconds run out first (PR #1150, #1172, #1488), or over the last share of the run down to a floor (PR #1958); see
training.md 2.6. The clock counts seconds of training and stands still while something else, such as validation, is done
(training.md 2.5).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from fairway.runtime.distributed import World
from fairway.runtime.settings import Section
from fairway.tokens.data_orders import LoaderSettings
from fairway.training.adamw import AdamWSettings
from fairway.training.averages import SwaSettings
from fairway.training.muon import MuonSettings
from fairway.training.qat import QatSettings


class ScheduleSettings(Section):
    """The learning-rate multiplier, which is 1 and later falls in a line to `floor`; the start of depth recurrence."""

    # With "steps" it falls over the last `warmdown` steps, with "fraction" over the last `warmdown` share of the run.
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


class TrainSettings(Section):
    """A training run: its length, its data, its optimizers and schedules, and what it logs and keeps."""

    max_steps: int = Field(gt=0)
    max_wallclock_s: float | None
    reserve_s: float = Field(ge=0)
    batch_tokens: int = Field(gt=0)
    micro_batch_tokens: int = Field(gt=0)
    loader: LoaderSettings
    muon: MuonSettings
    adamw: AdamWSettings
    schedule: ScheduleSettings
    grad_clip: float = Field(gt=0)
    clip: Literal["micro_batch", "step"]
    ema_decays: list[float] = Field(min_length=1)
    qat: QatSettings | None
    swa: SwaSettings
    log_every: int = Field(gt=0)
    val_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    # Steps that are run before the clock starts, so that everything is compiled by then. Without `compile` it is 0.
    warmup_steps: int = Field(ge=0)
    compile: bool

    @model_validator(mode="after")
    def _agree(self) -> "TrainSettings":
        if self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"micro_batch_tokens ({self.micro_batch_tokens}) must divide batch_tokens ({self.batch_tokens})"
            )
        if any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays {self.ema_decays}: each must lie between 0 and 1")
        if self.max_wallclock_s is not None and self.max_wallclock_s <= self.reserve_s:
            raise ValueError(f"max_wallclock_s ({self.max_wallclock_s}) must exceed reserve_s ({self.reserve_s})")
        if self.warmup_steps and not self.compile:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) are run to compile: expected 0 with compile: false")
        return self


@dataclass(frozen=True)
class Moment:
    """Where a run stands: the number of steps done, and the seconds on rank 0's training clock, known to every rank."""

    step: int
    clock_s: float


@dataclass(frozen=True)
class Budget:
    """How long a run may go on: this many steps, and this many seconds of its clock unless clock_s is None."""

    steps: int
    clock_s: float | None

    def fraction(self, now: Moment) -> float:
        """The share of the run that is over, from 0 to 1, by the limit that is nearer."""
        by_steps = now.step / self.steps
        return by_steps if self.clock_s is None else max(by_steps, now.clock_s / self.clock_s)

    def steps_left(self, now: Moment) -> float:
        """The number of steps that remain. If seconds run out first it is estimated from the mean time of a step."""
        left = float(self.steps - now.step)
        if self.clock_s is None:
            return left
        step_s = now.clock_s / max(now.step, 1)
        return min(left, max(self.clock_s - now.clock_s, 0.0) / step_s) if step_s > 0 else left

    def spent(self, now: Moment) -> str | None:
        """The limit that is reached, "steps" or "wallclock", or None if the run goes on."""
        if now.step >= self.steps:
            return "steps"
        return "wallclock" if self.clock_s is not None and now.clock_s >= self.clock_s else None


def forecast(known: Moment, step: int) -> Moment:
    """Where a run will stand when so many steps are done, if they take as long as those done at a known moment.

    The host gives the device its next steps before it knows when the last ones were done. If the schedules waited for
    the clock, the device would wait for the host.
    """
    return Moment(step, known.clock_s * step / known.step if known.step else known.clock_s)


def run_budget(train: TrainSettings) -> Budget:
    """How long the run may go on: max_steps, and max_wallclock_s less reserve_s unless that is null."""
    seconds = train.max_wallclock_s
    return Budget(train.max_steps, None if seconds is None else seconds - train.reserve_s)


def lr_multiplier(schedule: ScheduleSettings, budget: Budget, now: Moment) -> float:
    """The factor on all learning rates in the step that begins now."""
    if schedule.warmdown_unit == "steps":
        left = budget.steps_left(now) / schedule.warmdown
    else:
        left = (1 - budget.fraction(now)) / schedule.warmdown
    return min(1.0, max(left, schedule.floor))


def muon_momentum(muon: MuonSettings, step: int) -> float:
    """Muon's momentum in the step with this index, counted from 0.

    It rises in a line from momentum_start to momentum over momentum_warmup_steps, and then stays.
    """
    risen = min(step / muon.momentum_warmup_steps, 1.0) if muon.momentum_warmup_steps else 1.0
    return (1 - risen) * muon.momentum_start + risen * muon.momentum


def loop_is_on(schedule: ScheduleSettings, budget: Budget, now: Moment) -> bool:
    """Whether the step that begins now has depth recurrence (model.loop). PR #1855 has it from 35 % of the clock on."""
    return schedule.loop_from is None or budget.fraction(now) >= schedule.loop_from


class Clock:
    """A clock that runs from start() on and stands still inside paused().

    The host waits for the device on both sides of a pause, so that no work of the one side counts for the other.
    """

    def __init__(self, world: World, elapsed_s: float = 0.0) -> None:
        self.world, self.elapsed_s = world, elapsed_s
        self.running_since: float | None = None

    def start(self) -> None:
        """Let the clock run, once the device has finished what it was given before."""
        self.world.synchronize()
        self.running_since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far. The host reads them without waiting, so that the device may still be at work on them."""
        return self.elapsed_s + (time.perf_counter() - self.running_since if self.running_since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the clock stand still inside the block."""
        self.world.synchronize()
        self.elapsed_s, self.running_since = self.read(), None
        yield
        self.start()
