"""SLOT with one offset carried along the stream: fitted only on targets that have been scored, and so causal.

Within documents it is carried from one document to the next, too: no window is.

Legend: M scored places, D width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fairway.evaluation.passes import Prediction, State
from fairway.evaluation.scoring import Batch, WindowPass
from fairway.evaluation.slot_offsets import Offsets, SlotSettings, gradient, products, step_lr
from fairway.evaluation.windows import Windows, by_chunk, in_groups
from fairway.model.backends import compiled_on_gpu
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World

# Batches that the offset scores between two fits: what eight GPUs score at a time.
BATCHES = 8


class CarriedPass(WindowPass):
    """One offset for the whole stream: a chunk is scored with it, then it is fitted on the chunk's targets."""

    def __init__(self, model: GPT, tokens_N1: Tensor, windows: Windows, world: World, settings: SlotSettings) -> None:
        size = BATCHES * settings.batch_windows
        chunks = in_groups(windows, size)
        if settings.within_documents:
            # So many windows inside of documents score as many targets; at the beginning of one they score more.
            chunks = by_chunk(windows, targets=len(tokens_N1) - 1, chunk_tokens=size * settings.stride)
        self.settings, self.offsets = settings, (offsets := Offsets(model, 1, settings))
        # U (M, V) and targets (M,) of this process's batches of the chunk last predicted.
        self._scored = scored = list[tuple[Tensor, Tensor]]()

        # Not a method, which would hold self: see WindowPass.
        def head(model: GPT, batch: Batch, hid_BXD: Tensor) -> Tensor:
            U_MV = products(hid_BXD.flatten(0, 1)[batch.rows_M], model)
            scored.append((U_MV, batch.targets_BX.flatten()[batch.rows_M]))
            return softcap(U_MV + offsets.logit_shift(model), model.config.softcap)

        super().__init__(
            model,
            tokens_N1,
            chunks,
            world,
            batch_windows=settings.batch_windows,
            head=head,
            width=settings.stride,
            stretch=settings.stretch,
        )
        self._gradient = compiled_on_gpu(gradient, tokens_N1.device)

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """The predictions of a chunk. None is left out: all of them are learned from."""
        self._scored.clear()
        return super().predict(chunk)

    @torch.no_grad()
    def learn(self, chunk: int) -> None:
        """The steps of one fit, on from where the last one ended, moments and all."""
        count = int((self.windows[chunk].length - self.windows[chunk].first).sum())
        # There are no targets in a chunk that a long first window of a document reaches over.
        for step in range(self.settings.steps if count else 0):
            a_GV = self.offsets.logit_shift(self.model)
            gamma_GV = torch.zeros_like(a_GV)
            for U_MV, targets_M in self._scored:
                weight_GM = torch.full_like(targets_M, 1 / count, dtype=torch.float32)[None]
                gamma_GV += self._gradient(U_MV[None], a_GV, targets_M[None], weight_GM, self.model.config.softcap)
            total_GV = self.world.sum(gamma_GV).wait()
            self.offsets.step(self.model, total_GV, step_lr(self.settings, step))

    @property
    def updates(self) -> int:
        """The chunks whose fit a later chunk is scored with."""
        return self.chunks - 1 if self.settings.steps else 0

    def state(self) -> State:
        """The offset and its moments."""
        o = self.offsets
        return {"theta": o.theta, "mean": o.mean, "square": o.square, "steps": torch.tensor(o.steps)}

    def restore(self, state: State) -> None:
        """Put them back."""
        o = self.offsets
        o.theta, o.mean, o.square, o.steps = state["theta"], state["mean"], state["square"], int(state["steps"])
