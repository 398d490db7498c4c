"""The training loop: it takes a network, micro-batches and settings, and returns weights and figures.

Validation comes before the step that it is due at, as in the records (training.md 2.16); step.py says what a step does.
All ranks decide by rank 0's clock, so that they use the same learning rate, switch depth recurrence on together and
stop at the same step.
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
from fairway.runtime.progress import Figures
from fairway.runtime.resume import ResumePoints
from fairway.tokens.loader import Batch, Prefetcher, Segmenter
from fairway.tokens.validation import Validation
from fairway.training.run import Forward, Run
from fairway.training.schedule import Clock, TrainSettings, loop_is_on
from fairway.training.step import Underway, accumulate, launch, reached, settle

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
    every rank. Raises UserError once the figures of a step are known whose loss or gradient is not finite.
    """
    # All start from the weights of rank 0: from the same seed, a CPU of another kind draws other last bits.
    for weight in model.parameters():
        world.share(weight.data)
    run = Run.begin(model, loader, settings, world)
    compile_s = _warm_up(run) if settings.compile else 0.0
    if points and (point := points.load()):
        run.restore(*point)
        for step, figures in run.history:
            log(step, figures)
    clock = Clock(world, run.now.clock_s)

    def note(step: int, figures: Figures) -> None:
        run.history.append((step, figures))
        log(step, figures)

    def told(underway: Underway) -> Figures:
        figures = settle(run, clock, underway)
        tick(underway.step, figures)
        if underway.step <= FIRST_STEPS or underway.step % settings.log_every == 0:
            note(underway.step, figures)
        return figures

    # The clock starts here. It counts loading, micro-batches, optimizer, averages, logs and resume points; it stands
    # still during validation. Compiling and warming up came before and are not counted.
    clock.start()
    underway: Underway | None = None
    while True:
        stopped_by, due = run.budget.spent(run.now), run.step % settings.val_every == 0
        if underway and (stopped_by or due):
            figures, underway = told(underway), None
            # `stopped_by` came from a forecast. The clock itself says whether the run has come to its end.
            stopped_by = reached(run, clock)
        if stopped_by or due:
            with clock.paused():
                clock_s = clock.read()
                val_loss, val_bpb = _validate(run, validation)
                note(run.step, {"val_loss": val_loss, "val_bpb": val_bpb})
        if stopped_by:
            break
        before, underway = underway, launch(run, clock, underway)
        if before:
            figures = told(before)
        if points and run.step % settings.checkpoint_every == 0 and not run.budget.spent(run.now):
            figures, underway = told(underway), None
            tensors = run.named_tensors()
            if world.rank == 0:
                points.save(run.step, tensors, run.bookmark())

    weights = run.weights()
    bpb = {"last": val_bpb} | _averages_bpb(run, weights, validation)
    return Trained(weights, bpb, val_loss, figures["train_loss"], run.step, clock_s, compile_s, stopped_by)


def _averages_bpb(run: Run, weights: dict[str, dict[str, Tensor]], validation: Validation) -> dict[str, float]:
    """Validation bits per byte of each average of the weights. Afterwards the network has its last weights again."""
    bpb = {}
    for kind in list(weights)[1:]:
        run.load_weights(weights[kind])
        bpb[kind] = _validate(run, validation)[1]
    run.load_weights(weights["last"])
    return bpb


def _validate(run: Run, validation: Validation) -> tuple[float, float]:
    """Validation loss (nats per token) and bits per byte of the weights that the network has now.

    The network is not compiled for this: that would take longer than a few passes over the validation stream save.
    """
    return validate(
        run.model,
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

    Batches of batch_tokens // row rows go to the ranks in turn. With `segment` the rows of a batch are joined to one
    packed row, in which documents do not see each other, as PR #1958 trains and validates; a document that goes on from
    one row to the next is one document there. Batches are the same for any number of ranks and sums are float64, so
    that this number changes the last digits at most.
    """
    batch_rows = batch_tokens // row
    targets = len(validation.bytes)
    rows = targets // row
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    for begin in range(world.rank * batch_rows, rows, world.size * batch_rows):
        end = min(begin + batch_rows, rows)
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
            accumulate(run, forward, looped)
            run.optimizer.step(lr_scale=1.0, momentum=run.settings.muon.momentum_start)
    run.load_weights(before)
    run.optimizer.reset()
    run.loader.load_state_dict(position)
    run.world.synchronize()
    return time.monotonic() - started_at
