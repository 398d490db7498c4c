"""Rounding in forward passes."""

import torch
from torch import Tensor


def row_scales(W: Tensor, *, bits: int, min_clip: float) -> Tensor:
    """s (O, 1), with which each row's largest weight, or min_clip if that is more, becomes code n."""
    clip = W.abs().amax(dim=1, keepdim=True).clamp(min=max(min_clip, 1e-12))
    return clip / (2 ** (bits - 1) - 1)


def straight_through(W: Tensor, *, bits: int, min_clip: float) -> Tensor:
    """W rounded to nearest; the gradient passes unchanged."""
    s, n = row_scales(W, bits=bits, min_clip=min_clip), 2 ** (bits - 1) - 1
    return W + ((W / s).round().clamp(-n - 1, n) * s - W).detach()


def soft_round(W: Tensor, sharpness: Tensor, *, bits: int, min_clip: float) -> Tensor:
    """W drawn towards the nearest codes, the more the higher the sharpness (0-d); nothing is detached."""
    s, n = row_scales(W, bits=bits, min_clip=min_clip), 2 ** (bits - 1) - 1
    z = W / s
    low = z.floor()
    return (low + torch.sigmoid(sharpness * (z - low - 0.5))).clamp(-n, n) * s
