"""One optimizer step: given to the device, and its figures taken up when they are there.

The order of a step is that of the records (training.md 2.16): read the schedules, sum the gradients of the
micro-batches, update the weights, take them into the averages. The device gets the next step before the host has the
figures of the last one, so that it never waits for the host.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.runtime.distributed import Reading
from fairway.runtime.errors import UserError
from fairway.runtime.progress import Figures
from fairway.training.qat import rounding_begins
from fairway.training.run import Forward, Run
from fairway.training.schedule import Clock, Moment, loop_is_on, lr_multiplier, muon_momentum


@dataclass(frozen=True)
class Underway:
    """A step that the device was given: its number from 1, what it was given with, and its figures, still to come.

    The reading holds a row of each rank: seconds of its clock, steps done by then, loss, and norms of the gradient by
    group, of the micro-batches and, with `has_norm`, of the step.
    """

    step: int
    schedules: Figures
    reading: Reading
    has_norm: bool


def launch(run: Run, clock: Clock, before: Underway | None) -> Underway:
    """Give the device the next step of the run, behind `before`, the last one whose figures were not taken up."""
    done = run.step if before is None or before.reading.arrived() else before.step - 1
    moment = Moment(done, clock.read())
    settings = run.settings
    lr_scale = lr_multiplier(settings.schedule, run.budget, run.now)
    momentum = muon_momentum(settings.muon, run.step)
    loss = accumulate(run, _forward(run, lr_scale), loop_is_on(settings.schedule, run.budget, run.now))
    step_norm = run.optimizer.step(lr_scale=lr_scale, momentum=momentum)
    run.step += 1
    run.average(lr_scale)
    reading = _reading(run, moment, loss, step_norm)
    return Underway(run.step, {"lr_scale": lr_scale, "momentum": momentum}, reading, step_norm is not None)


def settle(run: Run, clock: Clock, underway: Underway) -> Figures:
    """The figures of a step, for which the host waits: from one exchange, and the same on every rank but for the time.

    train_loss is the mean over ranks, micro_grad_norm the mean of the micro-batches' gradient norms, grad_norm the norm
    of the step's gradient, where the step had to know it (clip: step). Raises UserError, on every rank, if a loss or a
    norm of any is not finite.
    """
    rows = underway.reading.read()
    clock_s = clock.read()
    run.known = Moment(int(rows[0][1]), rows[0][0])
    _, _, losses, *columns = zip(*rows, strict=True)
    groups = len(run.optimizer.gradients.groups)
    # Every rank has the mean loss of its own micro-batches, but only a share of the norms' means over all of them.
    train_loss, shares = math.fsum(losses) / run.world.size, [math.fsum(column) for column in columns[: groups + 1]]
    _demand_finite(run, underway.step, train_loss, shares[:groups])
    figures = {"train_loss": train_loss, "micro_grad_norm": shares[groups]}
    if underway.has_norm:
        # Every rank has computed the whole of the step's norm.
        figures["grad_norm"] = columns[-1][0]
    return figures | underway.schedules | {"clock_s": clock_s, "step_ms": 1000 * clock_s / underway.step}


def reached(run: Run, clock: Clock) -> str | None:
    """The limit that the run has reached by rank 0's clock, with no step under way; None if it goes on."""
    now = torch.tensor([clock.read()], device=run.world.device)
    run.known = Moment(run.step, run.world.gather(now).read()[0][0])
    return run.budget.spent(run.known)


def accumulate(run: Run, forward: Forward, looped: bool) -> Tensor:
    """Sum the gradients of this rank's micro-batches of a step; return their mean loss (0-d, on the device)."""
    gradients = run.optimizer.gradients
    gradients.clear()
    losses = []
    for _ in range(gradients.micro_batches // run.world.size):
        inputs, targets, segments = run.loader.next_batch()
        loss = forward(inputs, targets, segments=segments, looped=looped)
        loss.backward()
        run.optimizer.add_gradients()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _forward(run: Run, lr_scale: float) -> Forward:
    """The forward pass of the next step: with train.qat, that of rounded matrices from some step on."""
    if not (qat := run.settings.qat):
        return run.forwards.plain
    if run.rounded_from is None and rounding_begins(qat, run.step, lr_scale):
        run.rounded_from = run.step
    return run.forwards.plain if run.rounded_from is None else run.forwards.rounded_at(run.step - run.rounded_from)


def _reading(run: Run, moment: Moment, loss: Tensor, step_norm: Tensor | None) -> Reading:
    """This rank's row of what Underway.reading holds, on its way to the hosts of all ranks."""
    gradients = run.optimizer.gradients
    whole = torch.stack([gradients.norm] if step_norm is None else [gradients.norm, step_norm])
    norms = torch.cat([gradients.norms, whole]).double()
    counted = [torch.full_like(norms[:1], number) for number in (moment.clock_s, moment.step)]
    return run.world.gather(torch.cat([*counted, loss.double()[None], norms]))


def _demand_finite(run: Run, step: int, loss: float, group_norms: list[float]) -> None:
    """Raise UserError if the loss or a group's gradient norm is NaN or infinite."""
    norms = zip(run.optimizer.gradients.groups, group_norms, strict=True)
    groups = [name for name, norm in norms if not math.isfinite(norm)]
    if groups or not math.isfinite(loss):
        raise UserError(
            f"params.yaml: train: loss {loss} at step {step}, gradient not finite in: "
            f"{', '.join(groups) or 'no group'}; lower train.muon.lr (matrix) or train.adamw's rates (table, scalar)"
        )
