"""Sums of the residual stream and their norms, as attention and MLP read them.

Legend: B rows, T tokens, U rows of a table of tokens, D model width, J sources of a sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.model.kernels import fused, in_place, powers_of_two
from fairway.model.precision import rms_norm


@dataclass(frozen=True)
class Normed:
    """scale·norm(u), which is x (B, T, D) if there are no factors, and else x times the factors (B, T, 1), float32.

    Where nothing needs a gradient, x is u itself: a product with a matrix then multiplies its own rows by the factors,
    which spares writing the norm to memory and reading it back.
    """

    x: Tensor
    factors: Tensor | None = None

    def last(self, places: int) -> "Normed":
        """The last places of each row."""
        return Normed(self.x[:, -places:], None if self.factors is None else self.factors[:, -places:])

    def computed(self) -> "Normed":
        """The same without factors: it lasts when u is later changed in place."""
        return Normed(self.tensor())

    def tensor(self, channels: int | None = None) -> Tensor:
        """The norm, (B, T, D), or its first `channels` channels."""
        x = self.x[..., :channels]
        return x if self.factors is None else (x * self.factors).to(x.dtype)


def norm(x_BTD: Tensor, scale: float) -> Normed:
    """scale·norm(x)."""
    if in_place(x_BTD):
        from fairway.model.kernels.join import factors

        x_BTD = x_BTD.contiguous()
        return Normed(x_BTD, factors(x_BTD, scale))
    return Normed(scale * rms_norm(x_BTD))


def weighted_sum(sources: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Σ weights[j]⊙sources[j]: two or three sources (B, T, D), weights of their dtype with one number or D.

    Where gradients flow through the sources but weights are fixed, it is one pass over the data each way.
    """
    fixed = torch.is_grad_enabled() and not any(weight.requires_grad for weight in weights)
    if fixed and fused(sources[0]) and powers_of_two(sources[0].size(-1)):
        from fairway.model.kernels.join import mix_norm

        first, second, *third = [source.contiguous() for source in sources]
        rows_JD = torch.stack([weight.expand(first.size(-1)) for weight in weights])
        total_BTD: Tensor = mix_norm(first, second, third[0] if third else None, rows_JD, None, 1.0, False)[0]
        return total_BTD
    return _sum([weight * source for weight, source in zip(weights, sources, strict=True)])


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def join(
    sources: list[Tensor], weights: Tensor | None, scale: float, rows_BT: Tensor | None = None
) -> tuple[Tensor, Normed]:
    """u = Σ weights[j]⊙sources[j], and scale·norm(u): two or three sources (B, T, D), weights (J, D) of their dtype.

    Weights may be None for two sources; they are then added as they are. With `rows_BT` the last source is a table
    (1, U, D), and these int64 say which row of it stands at each place.
    """
    aside = in_place(sources[0])
    if rows_BT is not None and not aside:
        sources, rows_BT = [*sources[:-1], sources[-1][0][rows_BT]], None
    if fused(sources[0]) and powers_of_two(sources[0].size(-1)):
        from fairway.model.kernels.join import mix_norm

        first, second, *third = [source.contiguous() for source in sources]
        u_BTD, normed = mix_norm(first, second, third[0] if third else None, weights, rows_BT, scale, aside)
        return u_BTD, Normed(u_BTD, normed) if aside else Normed(normed)
    terms = sources if weights is None else [w * x for w, x in zip(weights, sources, strict=True)]
    u_BTD = _sum(terms)
    return u_BTD, norm(u_BTD, scale)
