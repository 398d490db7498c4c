"""Arithmetic in the activation's dtype: masters stay float32, every weight is cast where it is used.

The records relied on autocast, whose rules differ between PyTorch versions: 2.13 turns RMSNorm into float32, which
drags the residual stream along. Explicit casts say the same thing once and for all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """x·Wᵀ in the dtype of `x` (..., in), for a weight (out, in) of any dtype. No network here has biases.

    `scale` (out,) multiplies the outputs. With `onto` (..., out), contiguous and in need of no gradient, they are added
    to it in place, which spares a pass over the data.
    """
    weight = weight.to(x.dtype) if scale is None else scaled(weight, scale, x.dtype)
    if onto is None:
        return F.linear(x, weight)
    return onto.flatten(0, -2).addmm_(x.flatten(0, -2), weight.T).view_as(onto)


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, its rows times `scale` (out,): less work than scaling what it puts out."""
    return weight.to(dtype, copy=True).mul_(scale.to(dtype)[:, None])


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean(x²) + ε) over the last dimension, no learned weight, in the dtype of `x` (sums are float32).

    ε is the float32 epsilon whatever the dtype, as in the records; left out, it would depend on the PyTorch version.
    """
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)
