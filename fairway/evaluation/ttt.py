"""Score-first test-time training: each chunk of the stream is scored, then trained on with SGD.

A chunk is trained on when all its targets are scored (exactly those, where the stride divides the window), so every
target is scored by weights that have not seen it. Within documents, a window that begins one may score targets of the
next chunk too, before they are trained on. The last chunk is not trained on. One optimizer serves the whole
stream: its momentum carries over from chunk to chunk, while the learning rate falls by a cosine over the chunks. With a
section `slot`, chunks are scored with SLOT; training never sees its offsets.

With within_documents, windows are cut at document starts, and the rows that are trained on are packed as in training
(PR #1958): attention keeps their documents apart and a gated smear stops at BOS, while a static smear and a bigram, of
networks that were not trained on packed rows, read the token before a BOS there. In the windows nothing does.
Source: PR #549 and #1150 (lr 0.002), #1493 (0.005), after #461. Ours: the list of windows that scores each target once,
and within documents.

Legend: N targets, R rows of a training step, T tokens of a row.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.trainable import Loss, Named, RoundedWeights, loss_with, sum_gradients, trainable
from fairway.evaluation.cuda_graph import as_cuda_graph
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.passes import Pass, State
from fairway.evaluation.scoring import WindowPass, WindowSettings, plain_head, stream_windows
from fairway.evaluation.slot import OffsetHead
from fairway.evaluation.slot_offsets import SlotFitSettings
from fairway.evaluation.windows import Windows, by_chunk
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.tokens.data_orders import document_bounds


class TttSettings(WindowSettings):
    """Score-first test-time training: SGD on each chunk after it was scored."""

    chunk_tokens: int = Field(gt=0)
    epochs: int = Field(ge=0)
    lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    batch_rows: int = Field(gt=0)
    freeze_blocks: int = Field(ge=0)
    # As in adapt.
    freeze: Literal["blocks", "vectors"]
    # Matrices that are rounded to 6 bits while training (PR #1150: side, the projections of bigram and value tables).
    fake_quantize: Literal["none", "side", "all"]
    # Chunks are scored with SLOT as well (PR #1150).
    slot: SlotFitSettings | None

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """Chunks are whole rows and whole strides, and there are as many blocks as stay fixed."""
        super().check(section=section, model=model, processes=processes)
        if self.chunk_tokens % model.seq_len or self.chunk_tokens % self.stride:
            raise ValueError(
                f"{section}.chunk_tokens ({self.chunk_tokens}) must be a multiple of model.seq_len ({model.seq_len}) "
                f"and of {section}.stride ({self.stride})"
            )
        if self.slot is not None:
            self.slot.check_context(section=section, stride=self.stride, model=model)
        if self.within_documents and self.slot is not None:
            raise ValueError(f"{section}.slot: expected null with within_documents (the section slot has both)")
        if self.freeze_blocks > model.layers:
            raise ValueError(f"{section}.freeze_blocks ({self.freeze_blocks}) exceeds model.layers ({model.layers})")

    def looked_up(self) -> dict[str, str]:
        """With the list of windows, what the offset of SLOT is fitted on."""
        fitted = {"fairway.evaluation.slot.FITTED_ON": self.slot.fitted_on} if self.slot else {}
        return super().looked_up() | fitted


# Parts of a step's rows that go through the network on their own, as on the GPUs of the records. In bfloat16 a gradient
# depends on which rows it is of: with parts that do not depend on the processes, neither does the result.
LANES = 8
# The bounds of documents are padded to a multiple of so many, so that there are few shapes to record.
BOUNDS = 64


@dataclass(frozen=True)
class TttEvaluator(Evaluator):
    """Windows as in sliding evaluation, chunk by chunk, of a copy of the network that keeps learning."""

    settings: TttSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """Chunks of chunk_tokens, on a copy of the model."""
        s, targets = self.settings, len(tokens_N1) - 1
        windows = stream_windows(model, tokens_N1, s)
        chunks = by_chunk(windows, targets=targets, chunk_tokens=s.chunk_tokens)
        model = copy.deepcopy(model)
        free = trainable(model, freeze_blocks=s.freeze_blocks, freeze=s.freeze)
        return TttPass(model, free, tokens_N1, chunks, world, s)


class TttPass(WindowPass):
    """A pass that trains `free`, the named parameters of `model`, in place, on each chunk but the last."""

    def __init__(
        self, model: GPT, free: Named, tokens_N1: Tensor, chunks: list[Windows], world: World, settings: TttSettings
    ) -> None:
        head = OffsetHead(settings.slot, tokens_N1.device) if settings.slot else plain_head
        super().__init__(
            model,
            tokens_N1,
            chunks,
            world,
            batch_windows=settings.batch_windows,
            head=head,
            width=None if settings.slot else settings.stride,
            stretch=settings.stretch,
        )
        self.settings, self.free, self._rounded = settings, dict(free), RoundedWeights(model)
        self._optimizer = torch.optim.SGD(self.free.values(), lr=settings.lr, momentum=settings.momentum)
        gradients = flat_gradients(loss_with(model, settings.fake_quantize), list(self.free.values()))
        self._gradients = as_cuda_graph(gradients, tokens_N1.device)

    def learn(self, chunk: int) -> None:
        """Train on the chunk's rows, settings.epochs times over, in steps of at most batch_rows rows."""
        if chunk == self.chunks - 1:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.lr * cosine(chunk, self.chunks)
        begin, end = chunk * self.settings.chunk_tokens, (chunk + 1) * self.settings.chunk_tokens
        shape, size = (-1, self.model.config.seq_len), self.settings.batch_rows
        rows_2RT = torch.stack([self.tokens_N1[begin + k : end + k].view(shape) for k in (0, 1)])
        for _ in range(self.settings.epochs):
            for rows in rows_2RT.split(size, 1):
                self._step(rows)

    @property
    def updates(self) -> int:
        """The chunks that are trained on."""
        return self.chunks - 1 if self.settings.epochs else 0

    def _step(self, rows_2RT: Tensor) -> None:
        """One step on the mean loss of all rows, of which each process takes its share of lanes."""
        parameters = list(self.free.values())
        sizes, rows = [parameter.numel() for parameter in parameters], rows_2RT.size(1)

        def gradients(lane: int) -> list[Tensor]:
            of_lane = rows_2RT[:, lane::LANES]
            pieces = (self._gradients(of_lane, *self._bounds(of_lane[0])) * (of_lane.size(1) / rows)).split(sizes)
            return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]

        sum_gradients(parameters, min(LANES, rows), gradients, self.world)
        clip_grad_norm_(parameters, self.settings.grad_clip)
        self._optimizer.step()
        self._rounded.round()
        self._optimizer.zero_grad()

    def _bounds(self, tokens_RT: Tensor) -> list[Tensor]:
        """The bounds (n,) int32 of the documents in rows (causal_attention.attend), if these are to be kept apart."""
        if not self.settings.within_documents:
            return []
        row = tokens_RT.flatten().cpu().numpy()
        return [torch.from_numpy(document_bounds(row, cut=len(row), bucket=BOUNDS)).to(tokens_RT.device)]

    def state(self) -> State:
        """The trained parameters and their momentum."""
        weights = {f"weight/{name}": parameter.detach() for name, parameter in self.free.items()}
        moving = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self.free.items()}
        return weights | {f"momentum/{name}": of["momentum_buffer"] for name, of in moving.items() if of}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put both back."""
        for name, parameter in self.free.items():
            parameter.copy_(state[f"weight/{name}"])
            if f"momentum/{name}" in state:
                self._optimizer.state[parameter]["momentum_buffer"] = state[f"momentum/{name}"]


def flat_gradients(loss: Loss, parameters: list[Parameter]) -> Callable[..., Tensor]:
    """The gradient of the mean loss of inputs and targets (2, R, T), for all parameters one after the other.

    It is given the rows and, where documents are kept apart in them, their bounds (n,) int32.
    """

    @torch.enable_grad()
    def gradients(rows_2RT: Tensor, segments: Tensor | None = None) -> Tensor:
        mean = loss(rows_2RT[0], rows_2RT[1], segments=segments)
        found = torch.autograd.grad(mean, parameters, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    return gradients


def cosine(chunk: int, chunks: int) -> float:
    """The learning rate of a chunk as a share of the first one's: half a cosine over the chunks, 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))
