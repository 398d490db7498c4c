"""LQER: a matrix's rounding error, approximated by a product of two small integer matrices that is added on decoding.

It helps only where the error has structure. Of an error without structure, rank 4 removes almost nothing.

Legend: W weights and Ŵ the same after rounding, E = W - Ŵ (R, C) the error, A (R, k) and B (k, C) its factors of rank
k.

Method: arXiv:2402.02446, with the grids of PR #1855: 2 bits for A, 4 bits for B (quantize.md 2.5).
"""

import torch
from pydantic import Field
from torch import Tensor

from fairway.codec.codes import LowRank
from fairway.quantization.clip import SMALLEST_SCALE
from fairway.runtime.settings import Section


class LqerSettings(Section):
    """Low-rank correction of the `tensors` matrices with the largest error."""

    rank: int = Field(gt=0)
    tensors: int = Field(gt=0)
    group: int = Field(gt=0)


# For each factor: the smallest code, the largest code, and what its largest magnitude is divided by to give its scale
# (PR #1855).
A_GRID = (-2, 1, 1.5)
B_GRID = (-8, 7, 7.5)


def low_rank(E: Tensor, *, rank: int, group: int) -> LowRank:
    """A correction of rank `rank` for an error E (R, C) float32: its largest singular vectors, rounded to the grids.

    The singular values go into A. A has one scale, B one for every `group` consecutive elements of its flattened form,
    so that `group` must divide rank * C.
    """
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return quantize_factors(U[:, :rank] * S[:rank], Vh[:rank], group=group)


def quantize_factors(A: Tensor, B: Tensor, *, group: int) -> LowRank:
    """The correction whose factors are A (R, k) and B (k, C), both float32, rounded to the grids."""
    a, a_scale = _to_grid(A.reshape(1, -1), *A_GRID)
    b, b_scale = _to_grid(B.reshape(-1, group), *B_GRID)
    return LowRank(a.view(A.shape), b.view(B.shape), a_scale, b_scale)


def _to_grid(rows: Tensor, lowest: int, largest: int, divisor: float) -> tuple[Tensor, Tensor]:
    """Codes int8 of the same shape as `rows`, and a float16 scale for each row."""
    scale = (rows.abs().amax(dim=1) / divisor).clamp(min=SMALLEST_SCALE).half()
    return (rows / scale.float()[:, None]).round().clamp(lowest, largest).to(torch.int8), scale
