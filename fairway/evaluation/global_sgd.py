"""Global SGD of phased LoRA TTT: the network itself is trained on documents that have been scored (PR #1855).

Legend: N tokens of a phase, S segment bounds.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.trainable import RoundedWeights, sum_gradients
from fairway.evaluation.cuda_graph import as_cuda_graph
from fairway.evaluation.ttt import cosine
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.tokens.data_orders import document_bounds

# Segment bounds are padded to a multiple of this.
BOUNDS = 64


class GlobalSgdSettings(Protocol):
    """What it needs of the evaluator's settings."""

    global_chunk_tokens: int
    global_lr: float
    global_momentum: float
    grad_clip: float
    lanes: int


class GlobalSgd:
    """Trains all weights of `model`, in place; bfloat16 ones become float32 and are rounded after every step."""

    def __init__(self, model: GPT, settings: GlobalSgdSettings, world: World) -> None:
        self.settings, self.world = settings, world
        self._rounded = RoundedWeights(model)
        self._parameters = list(model.requires_grad_(True).parameters())
        self._cut, self._share = model.config.seq_len, settings.global_chunk_tokens // settings.lanes
        self._gradients = as_cuda_graph(lane_gradients(model, self._share, settings.lanes), world.device)

    def train(self, tokens_N: Tensor) -> None:
        """One phase, without memory of earlier ones. What is left over behind the last whole step is not used."""
        s = self.settings
        optimizer = torch.optim.SGD(self._parameters, lr=s.global_lr, momentum=s.global_momentum)
        chunks = -(-(len(tokens_N) - 1) // s.global_chunk_tokens)
        for index in range(chunks - 1):
            begin = index * s.global_chunk_tokens
            optimizer.param_groups[0]["lr"] = s.global_lr * cosine(index, chunks)
            self._step(tokens_N[begin : begin + s.global_chunk_tokens + 1], optimizer)

    def _step(self, tokens: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on global_chunk_tokens + 1 tokens. Each lane packs its share into one row of separate documents."""
        sizes = [parameter.numel() for parameter in self._parameters]

        def gradients(lane: int) -> Sequence[Tensor]:
            row = tokens[lane * self._share : (lane + 1) * self._share + 1]
            bounds = document_bounds(row[:-1].cpu().numpy(), cut=self._cut, bucket=BOUNDS)
            found = self._gradients(torch.cat([row, torch.from_numpy(bounds).to(row)])).split(sizes)
            return [piece.view_as(parameter) for piece, parameter in zip(found, self._parameters, strict=True)]

        sum_gradients(self._parameters, self.settings.lanes, gradients, self.world)
        clip_grad_norm_(self._parameters, self.settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._rounded.round()


def lane_gradients(model: GPT, share: int, lanes: int) -> Callable[[Tensor], Tensor]:
    """A lane's part of the gradient, all parameters one after the other, from `share` + 1 tokens and then S bounds."""

    @torch.enable_grad()
    def gradients(row_and_bounds: Tensor) -> Tensor:
        row, segments = row_and_bounds[: share + 1], row_and_bounds[share + 1 :].int()
        loss = model(row[None, :-1], row[None, 1:], segments=segments) / lanes
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    return gradients
