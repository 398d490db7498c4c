"""Muon, the optimizer of the layers' matrices: momentum, then the nearest orthogonal matrix, then a step with decay.

    V <- mu V + g                      momentum, without a factor 1 - mu
    U  = g + mu V                      Nesterov
    U <- U / |row of U|                only with row_normalize (MuonEq-R, PR #1855)
    W <- (1 - eta lambda) W - eta sqrt(max(1, O/I)) NS(U)

where g is the gradient, mu the momentum, eta the learning rate, lambda the weight decay, and NS is Newton-Schulz's
iteration, which brings all singular values to about 1 with matrix products alone (training.md 2.7, 2.8). Matrices of
one shape form a stack. Each rank keeps the momentum of its share of a stack and orthogonalizes only that, as in PR #549
(training.md 2.9).

Legend: N matrices of one shape, O rows (outputs), I columns (inputs), P matrices of a stack with its padding to a
multiple of the ranks.

Method: Keller Jordan, "Muon" (kellerjordan.github.io/posts/muon); Polar Express, arXiv:2505.16932. Source: PR #1150,
#1172, #1488, #1855, #1958.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.runtime.distributed import Pending, World
from fairway.runtime.settings import Section
from fairway.training.gradients import Stack


class MuonSettings(Section):
    """How Muon steps the matrices of the layers."""

    lr: float = Field(ge=0)
    weight_decay: float = Field(ge=0)
    momentum: float = Field(ge=0, lt=1)
    momentum_start: float = Field(ge=0, lt=1)
    momentum_warmup_steps: int = Field(ge=0)
    orthogonalizer: Literal["classic", "polar_express"]
    ns_steps: int = Field(gt=0)
    row_normalize: bool
    # Storage of the momentum and of the gradients that the processes exchange.
    momentum_dtype: Literal["float32", "bfloat16"]
    # How the quadratic term of Newton-Schulz is formed: c(AA), or (cA)A as PR #1488; equal but for rounding.
    ns_association: Literal["square_first", "scale_first"]
    # Whether bigram.proj and ve.proj are stepped by MuonSettings (PR #1488) or, as scalars are, by AdamWSettings.
    side_matrices: bool

    @model_validator(mode="after")
    def _steps(self) -> "MuonSettings":
        if self.orthogonalizer == "polar_express" and self.ns_steps > 5:
            raise ValueError(f"ns_steps ({self.ns_steps}) exceeds the 5 iterations of polar_express")
        return self


class Muon:
    """Muon over stacks of matrices that are shared out among the ranks.

    A step comes in three phases, so that the exchange of gradients runs while the caller steps its other parameters:

    1. launch() starts to sum the gradients of every stack over the ranks; each rank receives its share of a stack.
    2. The caller steps everything else.
    3. step() orthogonalizes this rank's share of one stack after another. It starts to gather each result from all
       ranks, and applies the result before it in the meantime.
    """

    def __init__(
        self, stacks: list[Stack], settings: MuonSettings, world: World, *, compute_dtype: torch.dtype
    ) -> None:
        self.stacks, self.settings, self.world, self.compute_dtype = stacks, settings, world, compute_dtype
        self.iterations = coefficients(settings.orthogonalizer, settings.ns_steps)
        # The dtype of the momentum and of the gradients that are exchanged. PR #1150, #1172 and #1958 use bfloat16.
        self.dtype: torch.dtype = getattr(torch, settings.momentum_dtype)
        self.momenta = [stack.total.new_zeros(self._share(stack), dtype=self.dtype) for stack in stacks]
        self.pending: list[Pending] = []

    def _share(self, stack: Stack) -> torch.Size:
        """The shape of this rank's share of a stack, (P / ranks, O, I)."""
        return torch.Size((stack.padded // self.world.size, *stack.total.shape[1:]))

    def launch(self) -> None:
        """Start to sum the gradients of every stack over the ranks."""
        self.pending = [self.world.scatter_sum(stack.total.to(self.dtype)) for stack in self.stacks]

    def squared_norm(self) -> Tensor:
        """The squared L2 norm (0-d float32) of this rank's shares of the summed gradients."""
        shares = [pending.wait() for pending in self.pending]
        return torch.stack(torch._foreach_norm(shares, dtype=torch.float32)).square().sum()

    @torch.no_grad()
    def step(self, *, lr_scale: float, momentum: float, factor: Tensor | None = None) -> None:
        """Update the matrices with the gradients that launch() summed, times `factor` (0-d) if it is given."""
        before: tuple[Stack, Pending] | None = None
        for stack, V, pending in zip(self.stacks, self.momenta, self.pending, strict=True):
            g = pending.wait() if factor is None else pending.wait() * factor
            V.mul_(momentum).add_(g)
            update = self.world.stack(self._direction(g.add(V, alpha=momentum)))
            if before:
                self._apply(*before, lr_scale)
            before = stack, update
        if before:
            self._apply(*before, lr_scale)
        self.pending = []

    def _direction(self, U: Tensor) -> Tensor:
        """NS(U), after normalizing the rows of U (n, O, I) if the settings say so."""
        if self.settings.row_normalize:
            U = normalize_rows(U)
        scale_first = self.settings.ns_association == "scale_first"
        return orthogonalize(U, self.iterations, dtype=self.compute_dtype, scale_first=scale_first)

    def _apply(self, stack: Stack, update: Pending, lr_scale: float) -> None:
        """Decay the matrices of a stack and step them along `update` (P, O, I), whose padding is left out."""
        rows, columns = stack.total.shape[1:]
        lr = self.settings.lr * lr_scale
        O = update.wait()[: len(stack.parameters)].to(stack.parameters[0].dtype)
        torch._foreach_mul_(stack.parameters, 1 - lr * self.settings.weight_decay)
        torch._foreach_add_(stack.parameters, list(O.unbind(0)), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def named_tensors(self) -> dict[str, Tensor]:
        """The momentum of each matrix by its name, gathered from the ranks, so that every rank must call this.

        The result does not depend on the number of ranks.
        """
        tensors: dict[str, Tensor] = {}
        for stack, V in zip(self.stacks, self.momenta, strict=True):
            whole = self.world.stack(V).wait()
            tensors |= {name: whole[i] for i, name in enumerate(stack.names)}
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take this rank's share of what named_tensors returned, with any number of ranks."""
        for stack, V in zip(self.stacks, self.momenta, strict=True):
            whole = torch.zeros(stack.total.shape, dtype=V.dtype, device=V.device)
            for i, name in enumerate(stack.names):
                whole[i] = tensors[name]
            V.copy_(whole[self.world.rank * len(V) : (self.world.rank + 1) * len(V)])


def normalize_rows(U_NOI: Tensor) -> Tensor:
    """Each row divided by its L2 norm, which is taken in float32; a row of zeros stays zero. Source: PR #1855."""
    norm = U_NOI.float().norm(dim=-1, keepdim=True).clamp(min=1e-7)
    return U_NOI / norm.to(U_NOI.dtype)


def orthogonalize(
    G_NOI: Tensor, iterations: tuple[tuple[float, float, float], ...], *, dtype: torch.dtype, scale_first: bool = False
) -> Tensor:
    """Each matrix (O, I) with its singular values brought to about 1, in `dtype`; a zero matrix stays zero.

    `iterations` are the coefficients (a, b, c) of each iteration. With scale_first the quadratic term is formed as
    (cA)A, as in PR #1488, otherwise as c(AA); the two differ in rounding alone.
    """
    X = G_NOI.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in iterations:
        A = X @ X.mT
        B = torch.baddbmm(A, c * A, A, beta=b) if scale_first else torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


# The coefficients (a, b, c) of an iteration X <- aX + (bA + cA^2)X with A = XX'. Those of Keller Jordan's quintic are
# the same in every iteration.
CLASSIC = (3.4445, -4.7750, 2.0315)
# Those of Polar Express (arXiv:2505.16932) for 5 iterations in bfloat16, as in PR #1855 without a safety factor.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def coefficients(orthogonalizer: str, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The coefficients of `steps` iterations: as many classic ones, or the first of Polar Express (at most 5)."""
    return POLAR_EXPRESS[:steps] if orthogonalizer == "polar_express" else (CLASSIC,) * steps
