"""The training loop: it takes a network, micro-batches and settings, and returns weights and figures.

The order of a step is that of the records (training.md 2.16): validate if it is time to, read the schedules, sum the
gradients of the micro-batches, update the weights, take them into the averages. All ranks decide by rank 0's clock, so
that they use the same learning rate, switch depth recurrence on together and stop at the same step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.progress import Figures
from fairway.runtime.resume import ResumePoints
from fairway.tokens.loader import Batch, Prefetcher, Segmenter
from fairway.tokens.validation import Validation
from fairway.training.qat import rounding_begins
from fairway.training.run import Forward, Run
from fairway.training.schedule import Clock, Moment, TrainSettings, loop_is_on, lr_multiplier, muon_momentum

# Called with the number of steps done and with figures, either of the last step or of a validation behind it.
Callback = Callable[[int, Figures], None]

# The first steps are all logged, as in the records, since that is where most faults of a run show.
FIRST_STEPS = 10


@dataclass(frozen=True)
class Trained:
    """What training leaves: weights by kind ("last", "ema_<decay>", "swa" if collected), their bpb, and figures.

    `clock_s` are the seconds of the training clock until the device had done the last step, and `compile_s` those of
    compiling and warming up before this process started the clock.
    """

    weights: dict[str, dict[str, Tensor]]
    val_bpb: dict[str, float]
    val_loss: float
    train_loss: float
    steps: int
    clock_s: float
    compile_s: float
    stopped_by: str


def train(
    model: GPT,
    loader: Prefetcher,
    validation: Validation,
    settings: TrainSettings,
    world: World,
    *,
    log: Callback,
    tick: Callback,
    points: ResumePoints | None = None,
) -> Trained:
    """Train `model` (initialised, on world.device) in place until its budget of steps or seconds is spent.

    If `points` holds a resume point of this run, training goes on from there; a new one is saved every checkpoint_every
    steps. `tick` is called after every step, `log` with the figures of steps that are logged or validated, both on
    every rank. Raises UserError after the first step whose loss or gradient is not finite.
    """
    run = Run.begin(model, loader, settings, world)
    compile_s = _warm_up(run) if settings.compile else 0.0
    if points and (point := points.load()):
        run.restore(*point)
        for step, figures in run.history:
            log(step, figures)

    def note(figures: Figures) -> None:
        run.history.append((run.now.step, figures))
        log(run.now.step, figures)

    # The clock starts here. It counts loading, micro-batches, optimizer, averages, logs and resume points; it stands
    # still during validation. Compiling and warming up came before and are not counted.
    clock = Clock(world, run.now.clock_s)
    clock.start()
    while True:
        stopped_by = run.budget.spent(run.now)
        if stopped_by or run.now.step % settings.val_every == 0:
            with clock.paused():
                # The device has done all its work by now, while `run.now` was read before the last step's was done.
                clock_s = clock.read()
                val_loss, val_bpb = _validate(run, validation)
                note({"val_loss": val_loss, "val_bpb": val_bpb})
        if stopped_by:
            break
        figures = _step(run, clock)
        tick(run.now.step, figures)
        if run.now.step <= FIRST_STEPS or run.now.step % settings.log_every == 0:
            note(figures)
        if points and run.now.step % settings.checkpoint_every == 0 and not run.budget.spent(run.now):
            tensors = run.named_tensors()
            if world.rank == 0:
                points.save(run.now.step, tensors, run.bookmark())

    weights = run.weights()
    bpb = {"last": val_bpb} | _averages_bpb(run, weights, validation)
    return Trained(weights, bpb, val_loss, figures["train_loss"], run.now.step, clock_s, compile_s, stopped_by)


def _averages_bpb(run: Run, weights: dict[str, dict[str, Tensor]], validation: Validation) -> dict[str, float]:
    """Validation bits per byte of each average of the weights. Afterwards the network has its last weights again."""
    bpb = {}
    for kind in list(weights)[1:]:
        run.load_weights(weights[kind])
        bpb[kind] = _validate(run, validation)[1]
    run.load_weights(weights["last"])
    return bpb


def _step(run: Run, clock: Clock) -> Figures:
    """Take one optimizer step and return its figures. The host waits for the device once, at the end."""
    settings, step = run.settings, run.now.step
    lr_scale = lr_multiplier(settings.schedule, run.budget, run.now)
    momentum = muon_momentum(settings.muon, step)
    looped = loop_is_on(settings.schedule, run.budget, run.now)
    forward = run.forwards.plain
    if settings.qat:
        if run.rounded_from is None and rounding_begins(settings.qat, step, lr_scale):
            run.rounded_from = step
        if run.rounded_from is not None:
            forward = run.forwards.rounded_at(step - run.rounded_from)
    loss = _accumulate(run, forward, looped)
    step_norm = run.optimizer.step(lr_scale=lr_scale, momentum=momentum)
    run.average(lr_scale)
    clock_s, figures = _shared(run, clock, loss, step_norm)
    run.now = Moment(step + 1, clock_s)
    return figures | {
        "lr_scale": lr_scale,
        "momentum": momentum,
        "clock_s": clock_s,
        "step_ms": 1000 * clock_s / run.now.step,
    }


def _shared(run: Run, clock: Clock, loss: Tensor, step_norm: Tensor | None) -> tuple[float, Figures]:
    """Rank 0's clock, and the loss and gradient norms over all ranks: the same on every rank, from one exchange.

    micro_grad_norm is the mean of the micro-batches' gradient norms, grad_norm the norm of the step's gradient, where
    the step had to know it (clip: step). Raises UserError, on every rank, if a loss or a norm of any is not finite.
    """
    gradients = run.optimizer.gradients
    whole = torch.stack([gradients.norm] if step_norm is None else [gradients.norm, step_norm])
    norms = torch.cat([gradients.norms, whole]).double()
    rows = run.world.gather(torch.cat([torch.full_like(norms[:1], clock.read()), loss.double()[None], norms]))
    clocks, losses, *columns = zip(*rows, strict=True)
    groups = len(gradients.groups)
    # Every rank has the mean loss of its own micro-batches, but only a share of the norms' means over all of them.
    train_loss, shares = math.fsum(losses) / run.world.size, [math.fsum(column) for column in columns[: groups + 1]]
    _demand_finite(run, train_loss, shares[:groups])
    figures = {"train_loss": train_loss, "micro_grad_norm": shares[groups]}
    # Every rank has computed the whole of the step's norm.
    return clocks[0], figures if step_norm is None else figures | {"grad_norm": columns[-1][0]}


def _accumulate(run: Run, forward: Forward, looped: bool) -> Tensor:
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


def _demand_finite(run: Run, loss: float, group_norms: list[float]) -> None:
    """Raise UserError if the loss or a group's gradient norm is NaN or infinite."""
    norms = zip(run.optimizer.gradients.groups, group_norms, strict=True)
    groups = [name for name, norm in norms if not math.isfinite(norm)]
    if groups or not math.isfinite(loss):
        raise UserError(
            f"params.yaml: train: loss {loss} at step {run.now.step + 1}, gradient not finite in: "
            f"{', '.join(groups) or 'no group'}; lower train.muon.lr (matrix) or train.adamw's rates (table, scalar)"
        )


def _validate(run: Run, validation: Validation) -> tuple[float, float]:
    """Validation loss (nats per token) and bits per byte of the weights that the network has now."""
    return validate(
        run.forwards.plain,
        validation,
        run.world,
        row=run.model.config.seq_len,
        batch_tokens=run.settings.micro_batch_tokens,
        looped=loop_is_on(run.settings.schedule, run.budget, run.now),
        segment=run.loader.segment,
    )


@torch.no_grad()
def validate(
    forward: Forward,
    validation: Validation,
    world: World,
    *,
    row: int,
    batch_tokens: int,
    looped: bool,
    segment: Segmenter | None = None,
) -> tuple[float, float]:
    """Mean loss (nats per token) and bits per byte over all rows of `row` tokens, the same on every rank.

    This says how good the weights of a run under way are. Each row of the stream is scored on its own, so that a token
    sees the tokens before it in its row alone; the evaluators of fairway/evaluation let it see more and score better.

    Each rank scores its share of the rows, batch_tokens // row of them at a time. With `segment` the rows of a batch
    are joined to one packed row, in which documents do not see each other, as PR #1958 trains and validates. Sums are
    float64, so that the number of ranks changes the last digits at most.
    """
    batch_rows = batch_tokens // row
    targets = len(validation.bytes)
    first, last = (targets // row * rank // world.size for rank in (world.rank, world.rank + 1))
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    for begin in range(first, last, batch_rows):
        end = min(begin + batch_rows, last)
        span = validation.tokens[begin * row : end * row + 1]
        width = len(span) - 1 if segment else row
        bounds = torch.from_numpy(segment(span[:-1].numpy())) if segment else None
        inputs, labels, segments = Batch(span[:-1].view(-1, width), span[1:].view(-1, width), bounds).to(world.device)
        nats += forward(inputs, labels, segments=segments, looped=looped).double() * inputs.numel()
    total = float(world.sum(nats).wait())
    return total / targets, total / math.log(2) / int(validation.bytes.sum())


def _warm_up(run: Run) -> float:
    """Compile every graph that the run will use by running warmup_steps steps with each; the seconds that this took.

    The weights, the optimizer and the position in the data are put back afterwards (training.md 2.4).
    """
    started_at = time.monotonic()
    before, position = run.weights()["last"], run.loader.state_dict()
    depths = (False, True) if run.settings.schedule.loop_from else (True,)
    forwards = [run.forwards.plain] + ([run.forwards.rounded_at(0)] if run.settings.qat else [])
    for forward, looped in product(forwards, depths):
        for _ in range(run.settings.warmup_steps):
            _accumulate(run, forward, looped)
            run.optimizer.step(lr_scale=1.0, momentum=run.settings.muon.momentum_start)
    run.load_weights(before)
    run.optimizer.reset()
    run.loader.load_state_dict(position)
    run.world.synchronize()
    return time.monotonic() - started_at
