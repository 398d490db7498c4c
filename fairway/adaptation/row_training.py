"""AdamW on whole rows of a token stream, before quantization.

The rows are dealt to lanes (trainable.py), which are coupled in one of two ways:

    step    each lane has a run of rows; a step averages the gradients of all lanes, then clips them (PR #1488)
    epoch   batches of rows are dealt to the lanes in turn; each lane trains alone, with moments of its own, and after
            every epoch the lanes' weights are averaged (PR #1958, recipe of #1911)

Each epoch has one learning rate, on a cosine from `lr` to lr·lr_floor. Rows come in the order of the stream, and
documents are not separated. The records train on the validation split: the weights then contain what they will be
scored on, and the score is not the length of a code. Training on the train split is ours.

Legend: R rows, T tokens of a row.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.trainable import Loss, RoundedWeights, loss_with, sum_gradients, sum_over_lanes, trainable
from fairway.model.backends import compiled_on_gpu
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World, alone
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens.shards import open_shard, shard_paths


class AdaptSettings(Section):
    """AdamWSettings on whole rows before quantization; 0 epochs passes the weights through."""

    epochs: int = Field(ge=0)
    split: Literal["train", "validation"]
    lr: float = Field(gt=0)
    lr_floor: float = Field(ge=0, le=1)
    # Of one lane.
    batch_rows: int = Field(gt=0)
    # The last so many rows of the split, which training in order reaches last; null takes all.
    max_rows: int | None = Field(gt=0)
    grad_clip: float = Field(gt=0)
    freeze_blocks: int = Field(ge=0)
    # What stays fixed in those blocks: everything, or only vectors and scalars (PR #1958, matrices being elsewhere).
    freeze: Literal["blocks", "vectors"]
    freeze_tokens: bool
    # Shares of the rows that are trained on side by side: the GPUs of a record. Processes do not change the result.
    lanes: int = Field(gt=0)
    # What lanes average: gradients at every step (PR #1488), or weights after every epoch (PR #1958).
    coupling: Literal["step", "epoch"]
    # Matrices that are rounded to 6 bits in the forward pass (PR #1488: all).
    fake_quantize: Literal["none", "side", "all"]

    @property
    def form(self) -> Literal["none", "rows"]:
        """Which of whole_record.ADAPTATIONS the weights go through."""
        return "rows" if self.epochs else "none"


def adapt(
    model: GPT,
    rows_RT1: Tensor,
    settings: AdaptSettings,
    stepped: Callable[[int], None],
    *,
    world: World | None = None,
) -> list[float]:
    """Train `model` in place on rows (R, T+1) int64 on its device; the mean loss of each epoch, in nats per token.

    A row's last token is the first of the next one. Every process is given the same rows and ends with the same
    weights; without a world there is one process. `stepped` is called with the number of rows trained on. Raises
    UserError if there are more processes than lanes, or if the loss is not finite.
    """
    world = world or alone(rows_RT1.device)
    world.need_lanes(settings.lanes, "adapt")
    trainer = Trainer(model, settings, world, stepped)
    train_epoch = {"step": trainer.epoch_of_steps, "epoch": trainer.epoch_of_lanes}[settings.coupling]
    losses = []
    for epoch in range(settings.epochs):
        train_epoch(rows_RT1, epoch_lr(settings, epoch))
        losses.append(trainer.mean_loss(len(rows_RT1)))
        if not math.isfinite(losses[-1]):
            raise UserError(f"params.yaml: adapt.lr ({settings.lr}): the loss of epoch {epoch} is {losses[-1]}")
    trainer.rounded.store()
    return losses


def epoch_lr(settings: AdaptSettings, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: a cosine that would reach the floor after the last epoch."""
    floor = settings.lr * settings.lr_floor
    return floor + (settings.lr - floor) * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))


class Trainer:
    """Trains the network in this process's lanes, each with an AdamW; steps taken together use the first one's."""

    def __init__(self, model: GPT, settings: AdaptSettings, world: World, stepped: Callable[[int], None]) -> None:
        free = trainable(
            model,
            freeze_blocks=settings.freeze_blocks,
            freeze=settings.freeze,
            freeze_tokens=settings.freeze_tokens,
        )
        self.parameters = [parameter for _, parameter in free]
        self.settings, self.world, self.stepped = settings, world, stepped
        self.rounded = RoundedWeights(model)
        self.mine = range(world.rank, settings.lanes, world.size)
        self.optimizers = {lane: adamw(self.parameters) for lane in self.mine}
        loss = loss_with(model, settings.fake_quantize)
        self.loss: Loss = compiled_on_gpu(loss, world.device)
        self.total = torch.zeros((), dtype=torch.float64, device=world.device)

    def epoch_of_steps(self, rows_RT1: Tensor, lr: float) -> None:
        """Each lane goes through a run of rows; a step averages the gradients of the lanes that have rows left."""
        lanes, rows = self.settings.lanes, len(rows_RT1)
        runs = [rows_RT1[rows * lane // lanes : rows * (lane + 1) // lanes] for lane in range(lanes)]
        batches = [run.split(self.settings.batch_rows) if len(run) else () for run in runs]
        for step in range(max(map(len, batches))):
            self._step_together([of_lane[step : step + 1] for of_lane in batches], lr)

    def epoch_of_lanes(self, rows_RT1: Tensor, lr: float) -> None:
        """Each lane trains alone on its share of the batches, from the same weights; then the weights are averaged."""
        batches = rows_RT1.split(self.settings.batch_rows)
        start = [parameter.detach().clone() for parameter in self.parameters]

        def trained(lane: int) -> list[Parameter]:
            self._set(start)
            for batch_RT1 in batches[lane :: self.settings.lanes]:
                for parameter, gradient in zip(self.parameters, self._gradients(batch_RT1, 1.0), strict=True):
                    parameter.grad = gradient
                self._step(self.optimizers[lane], lr)
            return self.parameters

        sums = sum_over_lanes(self.parameters, self.settings.lanes, trained, self.world)
        self._set([total / self.settings.lanes for total in sums])

    def mean_loss(self, rows: int) -> float:
        """The mean loss of the rows trained on since the last call, over all processes."""
        mean = float(self.world.sum(self.total).wait()) / rows
        self.total.zero_()
        return mean

    def _step_together(self, batches: Sequence[Sequence[Tensor]], lr: float) -> None:
        """One step on the mean loss of the lanes' batches; a lane that has none left has an empty sequence."""
        active = sum(map(len, batches))

        def gradients(lane: int) -> Sequence[Tensor | None]:
            return self._gradients(batches[lane][0], 1 / active) if batches[lane] else [None] * len(self.parameters)

        sum_gradients(self.parameters, len(batches), gradients, self.world)
        self._step(self.optimizers[self.mine[0]], lr)

    def _gradients(self, batch_RT1: Tensor, weight: float) -> Sequence[Tensor | None]:
        """The gradients of weight · mean loss of a batch of rows."""
        loss = self.loss(batch_RT1[:, :-1], batch_RT1[:, 1:])
        self.total += loss.detach() * len(batch_RT1)
        self.stepped(len(batch_RT1))
        return torch.autograd.grad(weight * loss, self.parameters, allow_unused=True)

    def _step(self, optimizer: torch.optim.AdamW, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        clip_grad_norm_(self.parameters, self.settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        self.rounded.round()

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        self.rounded.round()


def adamw(parameters: list[Parameter]) -> torch.optim.AdamW:
    """The optimizer of the records. Its learning rate is set before every step."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def load_rows(
    folder: Path, split: Literal["train", "validation"], *, seq_len: int, vocab_size: int, max_rows: int | None = None
) -> Tensor:
    """One split of a token folder as whole rows (R, seq_len + 1) int64; each row's last token begins the next one.

    `max_rows` keeps the last so many rows only, and shards before them are not read. The result is a view of one stream
    on the CPU. Raises UserError on a damaged shard or a split shorter than one row.
    """
    wanted = None if max_rows is None else max_rows * seq_len + 1
    tails: list[np.ndarray] = []
    for path in reversed(shard_paths(folder, "train" if split == "train" else "val")):
        tails.insert(0, open_shard(path, vocab_size=vocab_size))
        if wanted is not None and sum(map(len, tails)) >= wanted:
            break
    tokens = np.concatenate(tails)[-(wanted or 0) :].astype(np.int64)
    if len(tokens) <= seq_len:
        raise UserError(f"{folder}: {len(tokens)} {split} tokens, expected more than model.seq_len = {seq_len}")
    return torch.from_numpy(tokens).unfold(0, seq_len + 1, seq_len)
