"""In which precision the network computes: the dtype of its activations, and weights rounded to few bits.

Masters stay float32, and every weight is cast to the activation's dtype where it is used. The records relied on
autocast, whose rules differ between PyTorch versions: 2.13 turns RMSNorm into float32, which drags the residual stream
along. Explicit casts say the same thing once and for all.

A weight can also be rounded to the codes of few bits before it is used, so that training and adaptation see the network
as quantization will leave it. Functions that do so give each row of a matrix W (O, I) a scale in s (O, 1).

Legend: O rows (outputs), I columns (inputs), n the largest code, 2^(bits-1) - 1.
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
