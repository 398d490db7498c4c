# mypy: disallow-untyped-defs=False
"""AdamW without momentum, one pass over all numbers, for gradients in bfloat16 of float32 numbers.

With w the numbers, v their squared gradients and t the step, counted from 1 (arXiv:1711.05101, β₁ = 0):

    v ← β₂·v + (1 − β₂)·g²;  w ← (1 − lr·decay)·w − lr·g / (√(v / (1 − β₂ᵗ)) + ε)
"""

import triton
import triton.language as tl
from torch import Tensor

from fairway.model.kernels.tiles import read

SIZE = 2048


@triton.jit
def _step(numbers, squares, gradients, count, kept, lr, beta2, correction, eps, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    has = at < count
    g = read(gradients + at, has)
    v = beta2 * read(squares + at, has) + (1 - beta2) * g * g
    w = kept * read(numbers + at, has) - lr * g / (tl.sqrt(v / correction) + eps)
    tl.store(squares + at, v, mask=has)
    tl.store(numbers + at, w, mask=has)


def adamw_step(
    numbers: Tensor, squares: Tensor, gradients: Tensor, step: int, *, lr: float, beta2: float, eps: float, decay: float
) -> None:
    """Change `numbers` and `squares`, float32, in place; all three are contiguous and of one shape."""
    grid = (triton.cdiv(numbers.numel(), SIZE),)
    scalars = (1 - lr * decay, lr, beta2, 1 - beta2**step, eps)
    _step[grid](numbers, squares, gradients, numbers.numel(), *scalars, SIZE)
