"""Low-rank adapters beside the matrices of a network, one set for each row of the batch (LoRA, arXiv:2106.09685).

A set has two factors, A and B, at each site, and adds scale·B(A·x) to what the matrix there puts out. The sites:

    q, k, v   queries, keys and values, before their norm and rotation
    o         the output of attention, but the adapter reads the attention's input
    mlp       the output of the MLP, read from its input
    head      the logits, before the softcap

All but the head have their own factors in each application of a layer (depth recurrence applies some layers several
times). Source: PR #1855.

All factors of a set lie in one row of P numbers, so that whole sets can be copied, cast and stepped at once: first the
A of all sites, then the B. The A of q, k, v and o lie together, as all of them read the same input.

A product with a fixed matrix W and those with the adapters beside it are one differentiable function. Autograd's own
rules would give every reader of the input a gradient of its own and add them up one by one, each time a pass over
(B, T, D), and would put together slices of the outputs by passes over (B, T, O). Here everything is added where it
lies. With dy, dl and df the gradients of the three results, and l the reads of all adapters:

    forward     l = A·x;  y = W·x + scale·B(l);  f = the first channels of x
    backward    dl = scale·Bᵀdy, beside it dl as given;  dx = Wᵀdy + Aᵀdl + df;  dA = dl·xᵀ;  dB = scale·dy·lᵀ

Legend: L applications of layers, B rows, T tokens, D model width, O outputs of a site,
or of several side by side, r rank, V vocabulary, P numbers
of a set. Heads: H of queries, K of keys and values, S = H + 2K of both, E wide; X wanted places at the end of a row.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.model.attention import finished_queries, rotate
from fairway.model.config import ModelConfig
from fairway.model.context import Projection, Site
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT
from fairway.model.kernels import fused
from fairway.model.precision import linear, rms_norm

# Sites whose first factors lie together, in this order.
TOGETHER = ("q", "k", "v", "o")


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """How many applications a site has, and how many outputs; all sites read D channels."""
    applications = sum(len(half) for half in config.layer_order(looped=True))
    kv_width = config.kv_heads * config.head_dim
    outputs = {"q": config.width, "k": kv_width, "v": kv_width, "o": config.width, "mlp": config.width}
    return {site: (applications, width) for site, width in outputs.items()} | {"head": (1, config.vocab_size)}


# The first factors of every site, (L, B, r, D) float32.
Factors = dict[str, Tensor]


def draw_factors(config: ModelConfig, rows: int, rank: int, seed: int) -> Factors:
    """First factors, uniform in ±1/√D, drawn on the CPU: each site by a generator and a thread of its own.

    One generator alone takes more than a second for the 225 million numbers of a record's batch.
    """
    bound, sites = config.width**-0.5, site_shapes(config)

    def draw(index: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * len(sites) + index)
        return torch.empty(count, rows, rank, config.width).uniform_(-bound, bound, generator=generator)

    with ThreadPoolExecutor() as threads:
        drawn = threads.map(draw, range(len(sites)), (count for count, _ in sites.values()))
        return dict(zip(sites, drawn, strict=True))


# A site and an application of it.
Place = tuple[str, int]


def numbers_of_a_set(config: ModelConfig, rank: int) -> tuple[int, int]:
    """How many numbers the first factors of a set have, and how many it has in all (P)."""
    first, second = (sum(math.prod(shape) for shape in shapes.values()) for shapes in _shapes(config, rank))
    return first, first + second


def _shapes(config: ModelConfig, rank: int) -> tuple[dict[Place, tuple[int, int]], dict[Place, tuple[int, int]]]:
    """The shapes of all A and of all B, by place, in the order in which they lie; "qkvo" stands for those TOGETHER."""
    sites = site_shapes(config)
    first: dict[Place, tuple[int, int]] = {}
    second: dict[Place, tuple[int, int]] = {}
    for application in range(sites["q"][0]):
        first["qkvo", application] = (len(TOGETHER) * rank, config.width)
        first["mlp", application] = (rank, config.width)
    for site, (applications, width) in sites.items():
        second |= {(site, application): (width, rank) for application in range(applications)}
    return first | {("head", 0): (rank, config.width)}, second


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


class LoraAdapters:
    """The sets of B rows (model.context.Adapters): every factor is a leaf tensor over its part of `numbers_BP`.

    The numbers may be of any dtype, in which the adapters compute, and may be changed in place.
    """

    def __init__(self, config: ModelConfig, numbers_BP: Tensor, rank: int, *, scale: float) -> None:
        self.rank, self.scale, self.numbers_BP = rank, scale, numbers_BP
        shapes = _shapes(config, rank)
        sizes = [math.prod(shape) for half in shapes for shape in half.values()]
        parts = iter(numbers_BP.detach().split(sizes, 1))
        # A and B of every place, (B, r, D) or (B, 4r, D), and (B, O, r).
        self.first, self.second = (
            {place: next(parts).view(-1, *shape).requires_grad_() for place, shape in half.items()} for half in shapes
        )

    @property
    def factors(self) -> list[Tensor]:
        """All leaf tensors, in the order in which they lie in the numbers."""
        return [*self.first.values(), *self.second.values()]

    def projections(
        self,
        x_BTD: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        gain_H: Tensor,
        rope: tuple[Tensor, Tensor],
        application: int,
        *,
        wanted: int | None,
        channels: int,
    ) -> Projection:
        """Finished heads with what the sites q, k and v add, and what the site o reads (model.context.Adapters)."""
        q, k, v = weights
        kv_heads = k.size(0) * gain_H.numel() // q.size(0)
        if wanted is None:
            x_BTO, read_BTr, gate_BTC = self._products(x_BTD, weights, TOGETHER, application, channels)
            return Projection(*_finished_heads(x_BTO, rope, gain_H, kv_heads), gate_BTC, read_BTr)
        x_BTO, _, _ = self._products(x_BTD, (k, v), ("k", "v"), application)
        q_BXO, read_BXr, gate_BXC = self._products(x_BTD[:, -wanted:], (q,), ("q", "o"), application, channels)
        q_BXHE = finished_queries(q_BXO.unflatten(2, (gain_H.numel(), -1)), rope, gain_H)
        _, k_BTKE, v_BTKE = _finished_heads(x_BTO, rope, gain_H[:0], kv_heads)
        return Projection(q_BXHE, k_BTKE, v_BTKE, gate_BXC, read_BXr)

    def _products(
        self, x_BTD: Tensor, weights: Sequence[Tensor], sites: Sequence[str], application: int, channels: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Products with the matrices of the first sites side by side, what the others read, and channels of x."""
        Bs = [self.second[site, application] for site, _ in zip(sites, weights, strict=False)]
        weight_OD, A = torch.cat(list(weights)).to(x_BTD.dtype), self._first(sites, application)
        return adapted_products(x_BTD, weight_OD, A, Bs, scale=self.scale, channels=channels)

    def read(self, x_BTD: Tensor, site: Site, application: int) -> Tensor:
        """A·x, (B, T, r)."""
        return x_BTD @ self._first((site,), application).mT

    def onto(self, y_BTO: Tensor, site: Site, application: int, read_BTr: Tensor, scale_O: Tensor) -> Tensor:
        """y + scale⊙scale_O⊙B·read, in place: otherwise `y` would be copied first."""
        B = self.second[site, application] * (self.scale * scale_O.to(y_BTO.dtype))[:, None]
        return y_BTO.baddbmm_(read_BTr, B.mT)

    def onto_scores(self, scores_BTV: Tensor, hid_BTD: Tensor) -> Tensor:
        """The products of final hidden states with the token table, and what the head's adapters add, in place."""
        read_BTr = hid_BTD @ self.first["head", 0].mT
        return scores_BTV.baddbmm_(read_BTr, self.second["head", 0].mT, alpha=self.scale)

    def _first(self, sites: Sequence[str], application: int) -> Tensor:
        """The first factors of sites that read the same input, one below the other."""
        if sites == ("mlp",):
            return self.first["mlp", application]
        together = self.first["qkvo", application]
        if sites == TOGETHER:
            return together
        of_site = dict(zip(TOGETHER, together.split(self.rank, 1), strict=True))
        return torch.cat([of_site[site] for site in sites], 1)

    @torch.no_grad()
    def set_first(self, factors: Factors) -> None:
        """Put in first factors, and set the second ones to zero, so that nothing is added."""
        device = self.numbers_BP.device
        there = {site: A.to(device, non_blocking=True) for site, A in factors.items()}
        for (site, application), A in self.first.items():
            names = TOGETHER if site == "qkvo" else (site,)
            A.copy_(torch.cat([there[name][application] for name in names], 1))
        for B in self.second.values():
            B.zero_()


def _finished_heads(
    x_BTO: Tensor, rope: tuple[Tensor, Tensor], gain_H: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Finished queries (none where there is no gain), keys and values of their products side by side."""
    x_BTSE = x_BTO.unflatten(2, (gain_H.numel() + 2 * kv_heads, -1))
    if fused(x_BTO):
        from fairway.model.kernels.heads import finished_heads, fits

        if fits(gain_H.numel(), kv_heads, x_BTSE.size(3), rope[0].size(-1)):
            q_BTHE, k_BTKE, v_BTKE = finished_heads(x_BTO, *rope, gain_H.to(x_BTO.dtype), kv_heads)
            return q_BTHE, k_BTKE, v_BTKE
    q_BTHE, k_BTKE, v_BTKE = x_BTSE.split([gain_H.numel(), kv_heads, kv_heads], 2)
    return finished_queries(q_BTHE, rope, gain_H), rotate(rms_norm(k_BTKE), rope), v_BTKE


def adapted_logits(model: GPT, hid_BTD: Tensor, adapters: LoraAdapters) -> Tensor:
    """As model.logits, (B, T, V) float32, with what the head's adapters add before the softcap."""
    scores_BTV = adapters.onto_scores(linear(hid_BTD, model.embed.token), hid_BTD)
    return softcap(scores_BTV, model.config.softcap)
