"""What changes while a run goes on: learning rate, momentum, depth. All pure functions of where the run stands.

A run has up to two budgets, steps and seconds of training clock; the nearer one counts. With seconds, "the last W
steps" are estimated from the mean time of a step so far, as PR #1150, #1172 and #1488 do; PR #1958 decays over a share
of the budget, down to a floor.
"""

from dataclasses import dataclass

from stages import params


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


def run_budget(train: params.Train) -> Budget:
    """The budget that the train section gives; the reserve is taken off its seconds."""
    seconds = train.max_wallclock_s
    return Budget(train.max_steps, None if seconds is None else seconds - train.reserve_s)


def lr_multiplier(schedule: params.Schedule, budget: Budget, now: Moment) -> float:
    """What every base learning rate is multiplied by in the step that begins now: 1, then linear down to the floor."""
    if schedule.warmdown_unit == "steps":
        left = budget.steps_left(now) / schedule.warmdown
    else:
        left = (1 - budget.fraction(now)) / schedule.warmdown
    return min(1.0, max(left, schedule.floor))


def muon_momentum(muon: params.Muon, step: int) -> float:
    """Momentum of the step with that 0-based index: linear from momentum_start to momentum, then constant."""
    risen = min(step / muon.momentum_warmup_steps, 1.0) if muon.momentum_warmup_steps else 1.0
    return (1 - risen) * muon.momentum_start + risen * muon.momentum


def loop_is_on(schedule: params.Schedule, budget: Budget, now: Moment) -> bool:
    """Whether the step that begins now applies model.loop (PR #1855: from 35 % of the clock on)."""
    return schedule.loop_from is None or budget.fraction(now) >= schedule.loop_from
