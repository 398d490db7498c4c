"""Rotary position embedding (arXiv:2104.09864) on the first channels of each head.

Legend: B rows, T tokens, H heads, E width of a head, R rotated pairs.
"""

import torch
from torch import Tensor

from fairway.model.config import Rope


def frequencies(rope: Rope, length: int, device: torch.device) -> Tensor:
    """Radians per position, (R,) float32, for rows of `length` tokens.

    Rows longer than `reference_len` stretch the base, so that the slowest pair turns no further than it does in a row
    of that length (NTK-aware scaling by u/bloc97; PR #1150). PR #1855 keeps the frequencies in a buffer that a cast of
    the whole network has rounded to bfloat16: part of the trained network, since positions run to 98303.
    """
    base = rope.base
    if rope.reference_len is not None and length > rope.reference_len:
        base *= (length / rope.reference_len) ** (rope.dims / (rope.dims - 2))
    # In float64, so that every device rounds to the same float32.
    exponents = torch.arange(0, rope.dims, 2, device=device, dtype=torch.float64) / rope.dims
    omega = (base**-exponents).float()
    return omega.bfloat16().float() if rope.bf16_frequencies else omega


def rotary_table(rope: Rope, length: int, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at positions of rows of `length` tokens, each (T, 1, R), rounded to `dtype`.

    Angles have the dtype of the positions: float32, as in the records, or float64 where they go far beyond a row. The
    records count positions from 0 at the start of the row, also where a packed row holds several documents.
    """
    angles = torch.outer(positions_T, frequencies(rope, length, positions_T.device).to(positions_T.dtype))[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (j, j + R) of each head by minus their angle; channels from 2R on pass through."""
    cos, sin = table
    pairs = cos.size(-1)
    first, second, rest = x_BTHE.split([pairs, pairs, x_BTHE.size(-1) - 2 * pairs], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)
