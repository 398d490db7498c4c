"""The adapters of a batch of documents while they are fitted: their numbers in float32, and AdamW on them.

Documents are independent of each other, so rows may be stepped in groups, and rows whose document has ended need not be
computed any more: without a gradient and without momentum all that steps do to them is weight decay.

Legend: B rows of the batch, R rows of a group, P numbers of a row (evaluation/lora_adapters.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.evaluation.scoring import sent

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
