"""Products with a fixed matrix and with the low-rank adapters beside it, as one differentiable function.

Autograd's own rules would give every reader of the input a gradient of its own and add them up one by one, each time a
pass over (B, T, D), and would put together slices of the outputs by passes over (B, T, O). Here everything is added
where it lies. With dy, dl and df the gradients of the three results, and l the reads of all adapters:

    forward     l = A·x;  y = W·x + scale·B(l);  f = the first channels of x
    backward    dl = scale·Bᵀdy, beside it dl as given;  dx = Wᵀdy + Aᵀdl + df;  dA = dl·xᵀ;  dB = scale·dy·lᵀ

Legend: B rows, T tokens, D width, O outputs side by side, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def adapted_products(
    x_BTD: Tensor, weight_OD: Tensor, A: Tensor, Bs: Sequence[Tensor], *, scale: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, O), reads of further adapters (B, T, n·r), and the first channels of x; all in the dtype of x.

    The `Bs`, (B, outputs, r) each, belong to the outputs of y, side by side in their order. A (B, m·r, D) has their
    first factors in the same order, and then those of the n further adapters. The matrix gets no gradient.
    """
    y, read, few = _AdaptedProducts.apply(x_BTD, weight_OD, A, scale, channels, *Bs)
    return y, read, few


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, scale: float, channels: int, *Bs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, reads, rank = F.linear(x, weight), x @ A.mT, Bs[0].size(2)
        for added_to, read, B in zip(y.split(_outputs(Bs), 2), reads.split(rank, 2), Bs, strict=False):
            added_to.baddbmm_(read, B.mT, alpha=scale)
        ctx.save_for_backward(x, weight, A, reads, *Bs)
        ctx.scale, ctx.channels = scale, channels
        return y, reads[..., rank * len(Bs) :].clone(), x[..., :channels].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy, dfurther, dfew), (x, weight, A, reads, *Bs) = gradients, ctx.saved_tensors
        dreads, rank, dBs = torch.empty_like(reads), Bs[0].size(2), []
        parts = zip(dy.split(_outputs(Bs), 2), Bs, reads.split(rank, 2), dreads.split(rank, 2), strict=False)
        for dpart, B, read, dread in parts:
            dread.baddbmm_(dpart, B, beta=0, alpha=ctx.scale)
            dBs.append(torch.empty_like(B).baddbmm_(dpart.mT, read, beta=0, alpha=ctx.scale))
        dreads[..., rank * len(Bs) :] = dfurther
        dx = None
        # The first layer reads tokens alone, which need no gradient.
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).baddbmm_(dreads, A)
            dx[..., : ctx.channels] += dfew
        return dx, None, dreads.mT @ x, None, None, *dBs


def _outputs(Bs: Sequence[Tensor]) -> list[int]:
    return [B.size(1) for B in Bs]
