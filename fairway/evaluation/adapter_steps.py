"""The adapters of a batch of documents while they are fitted: their numbers, and the steps that change them.

The numbers of all adapters are kept in float32 and stepped by AdamW. Documents are independent of each other, so rows
may be stepped in groups, and rows whose document has ended need not be computed any more: without a gradient and
without momentum all that steps do to them is weight decay.

Scores and gradients are computed for a group of documents: on a GPU as recorded graphs, one pair for each shape. A
group's numbers are cast into one place, where the adapters of all shapes read them, and gradients are put into another:
so the recorded graphs need not know which rows of which batch they work on.

Legend: B rows of the batch, R rows of a group, C targets of a cut, D model width, V vocabulary, P numbers of a row's
adapters (lora_adapters.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.evaluation.cuda_graph import SharedMemory, TwoGraphs
from fairway.evaluation.document_batches import LENGTHS, Cut, windows
from fairway.evaluation.lora_adapters import LoraAdapters, adapted_logits, numbers_of_a_set
from fairway.evaluation.scoring import sent
from fairway.model.gpt import GPT

# AdamW without momentum (PR #1855).
BETA1, EPS = 0.0, 1e-10


@dataclass(frozen=True)
class AdamW:
    """Settings of the adapters' optimizer (arXiv:1711.05101)."""

    lr: float
    beta2: float
    weight_decay: float


class AdapterSets:
    """Numbers of B rows, of which the first `first` in each row belong to first factors."""

    def __init__(self, numbers_BP: Tensor, first: int, optimizer: AdamW) -> None:
        self.numbers_BP, self.first, self.optimizer = numbers_BP, first, optimizer
        self.squares_BP = torch.zeros_like(numbers_BP)

    def forget(self) -> None:
        """Begin anew for other documents, but with the first factors as they have become (PR #1855)."""
        self.numbers_BP[:, self.first :] = 0
        self.squares_BP.zero_()

    def step(self, rows: slice, gradients_RP: Tensor, step: int) -> None:
        """The step with this number, counted from 1, for some rows, in any dtype of gradients."""
        numbers, squares, o = self.numbers_BP[rows], self.squares_BP[rows], self.optimizer
        if numbers.is_cuda:
            from fairway.model.kernels.adamw_step import adamw_step

            settings = {"lr": o.lr, "beta2": o.beta2, "eps": EPS, "decay": o.weight_decay}
            adamw_step(numbers, squares, gradients_RP, step, **settings)
            return
        squares.mul_(o.beta2).addcmul_(gradients_RP, gradients_RP, value=1 - o.beta2)
        spread = (squares / (1 - o.beta2**step)).sqrt_().add_(EPS)
        numbers.mul_(1 - o.lr * o.weight_decay).addcdiv_(gradients_RP, spread, value=-o.lr)

    def decay(self, missed_B: Tensor) -> None:
        """What so many steps (B,) int64 would have done to the first factors of rows that they did not include."""
        kept_B = (1 - self.optimizer.lr * self.optimizer.weight_decay) ** missed_B.double()
        self.numbers_BP[:, : self.first] *= sent(kept_B.float(), self.numbers_BP.device)[:, None]


class AdapterSteps:
    """Groups of at most `most` rows, scored by `model`, whose weights may change between calls, but only in place."""

    def __init__(self, model: GPT, tokens_N1: Tensor, *, most: int, rank: int, scale: float) -> None:
        self.model, self.tokens_N1, self.rank, self.scale = model, tokens_N1, rank, scale
        _, numbers = numbers_of_a_set(model.config, rank)
        # A row is written before it is read, and rows that are never used take no memory.
        self._numbers_BP, self._gradients_BP = (
            torch.empty(most, numbers, dtype=model.compute_dtype, device=tokens_N1.device) for _ in range(2)
        )
        self._adapters: dict[int, LoraAdapters] = {}
        # By shape, once a cut of it was scored and had its gradients found: what was never run cannot be recorded.
        self._graphs: dict[tuple[int, int], TwoGraphs] = {}
        self._met: set[tuple[int, int]] = set()
        # What finds the gradients of the cut last scored.
        self._last: tuple[Tensor, Tensor] | TwoGraphs | None = None
        self._memory = SharedMemory() if tokens_N1.is_cuda else None

    def score(self, cut: Cut, numbers_RP: Tensor) -> Tensor:
        """The logits (R, C, V) float32 of a cut, which the next call may overwrite."""
        self._numbers_BP[: len(numbers_RP)].copy_(numbers_RP)
        # Whatever the last cut kept for its gradients is not needed any more, and its memory is.
        self._last = None
        shape, table_R4 = (len(numbers_RP), cut.length), sent(cut.table_R4, self.tokens_N1.device)
        if self._memory is None or shape not in self._met:
            logits_RCV = self._logits(table_R4, cut.length, cut.size)
            self._last = table_R4, logits_RCV
            return logits_RCV.detach()
        if shape not in self._graphs:
            self._graphs[shape] = self._record(table_R4, cut, self._memory)
        self._last = graphs = self._graphs[shape]
        return graphs.first(table_R4)

    def gradients(self, cut: Cut) -> Tensor:
        """Gradients (R, P) of the loss of the cut last scored, in the compute dtype; the next call overwrites them.

        The loss is the sum of the documents' mean losses, without those that end with the cut.
        """
        if isinstance(self._last, TwoGraphs):
            self._last.second()
        elif self._last is not None:
            self._put_gradients(*self._last, cut.length, cut.size)
            self._met.add((len(cut.table_R4), cut.length))
        return self._gradients_BP[: len(cut.table_R4)]

    def _record(self, table_R4: Tensor, cut: Cut, memory: SharedMemory) -> TwoGraphs:
        return TwoGraphs(
            lambda table: self._logits(table, cut.length, cut.size),
            lambda table, logits: self._put_gradients(table, logits, cut.length, cut.size),
            table_R4,
            memory,
        )

    @torch.enable_grad()
    def _logits(self, table_R4: Tensor, length: int, size: int) -> Tensor:
        """Logits of all places of a cut; those that are not scored are of some place or other."""
        w, adapters = windows(self.tokens_N1, table_R4, length, size), self._adapters_of(len(table_R4))
        # Scored places lie among the last `size` of the longest window, behind which it may be filled up.
        wanted = min(length, size + LENGTHS - 1)
        hid_RXD = self.model.hidden(w.tokens_RT, adapters=adapters, wanted=wanted if wanted < length else None)
        place_X = torch.arange(length - wanted, length, device=table_R4.device)
        # Picked by a product with ones and zeros: the gradient of indexing sorts its indices first.
        picked_RCX = (w.columns_RC[..., None] == place_X).to(hid_RXD.dtype)
        return adapted_logits(self.model, picked_RCX @ hid_RXD, adapters)

    @torch.enable_grad()
    def _put_gradients(self, table_R4: Tensor, logits_RCV: Tensor, length: int, size: int) -> None:
        w, rows = windows(self.tokens_N1, table_R4, length, size), len(table_R4)
        nats_RC = F.cross_entropy(logits_RCV.flatten(0, 1), w.targets_RC.flatten(), reduction="none").view(rows, size)
        factors = self._adapters_of(rows).factors
        found = torch.autograd.grad((nats_RC.mean(1) * w.goes_on_R).sum(), factors)
        parts = self._gradients_BP[:rows].split([factor[0].numel() for factor in factors], 1)
        torch._foreach_copy_([part.view_as(gradient) for part, gradient in zip(parts, found, strict=True)], found)

    def _adapters_of(self, rows: int) -> LoraAdapters:
        if rows not in self._adapters:
            self._adapters[rows] = LoraAdapters(self.model.config, self._numbers_BP[:rows], self.rank, scale=self.scale)
        return self._adapters[rows]
