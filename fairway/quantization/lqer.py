"""LQER: give back the largest part of a matrix's rounding error as a product of two small integer matrices.

E = W - Ŵ of R rows and C columns, A (R, k) and B (k, C) its factors of rank k.

Method: arXiv:2402.02446, with the asymmetric grids of PR #1855 (2-bit A, 4-bit B). It pays only where the error has
structure: of an unstructured error rank 4 removes almost nothing.
"""

import torch
from pydantic import Field
from torch import Tensor

from fairway.codec.codes import LowRank
from fairway.quantization.clip import SMALLEST_SCALE
from fairway.runtime.settings import Section


class LqerSettings(Section):
    """Low-rank correction of the matrices with the largest error (quantization/lqer.py)."""

    rank: int = Field(gt=0)
    tensors: int = Field(gt=0)
    group: int = Field(gt=0)


# Smallest and largest code of each factor, and the divisor that turns its largest magnitude into a step (PR #1855).
A_GRID = (-2, 1, 1.5)
B_GRID = (-8, 7, 7.5)


def low_rank(E: Tensor, *, rank: int, group: int) -> LowRank:
    """The correction nearest to E (float32) that the grids allow: A carries the singular values, B is scaled by group.

    `group` consecutive elements of the flattened B share a scale; it must divide rank * C.
    """
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return quantize_factors(U[:, :rank] * S[:rank], Vh[:rank], group=group)


def quantize_factors(A: Tensor, B: Tensor, *, group: int) -> LowRank:
    """A correction from float32 factors A (R, k), B (k, C)."""
    a, a_scale = _to_grid(A.reshape(1, -1), *A_GRID)
    b, b_scale = _to_grid(B.reshape(-1, group), *B_GRID)
    return LowRank(a.view(A.shape), b.view(B.shape), a_scale, b_scale)


def _to_grid(rows: Tensor, lowest: int, largest: int, divisor: float) -> tuple[Tensor, Tensor]:
    """Codes int8, and a float16 scale for each row."""
    scale = (rows.abs().amax(dim=1) / divisor).clamp(min=SMALLEST_SCALE).half()
    return (rows / scale.float()[:, None]).round().clamp(lowest, largest).to(torch.int8), scale
