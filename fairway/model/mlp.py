"""The MLP of a layer: LeakyReLU(0.5)², no gate, no bias (PR #549, after the ReLU² of arXiv:2109.08668).

Legend: B rows, T tokens, D model width, F MLP width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.config import ModelConfig
from fairway.model.kernels import fused
from fairway.model.norm import Normed
from fairway.model.precision import linear, scaled


class Mlp(nn.Module):
    """W_down·φ(W_up·n) with φ(p) = p² for p > 0 and p²/4 below."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.mlp_hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_hidden))

    def forward(self, n: Normed, scale: Tensor, onto: Tensor | None = None) -> Tensor:
        """From the normed and scaled input, (B, T, D) to (B, T, D), times `scale` (D,); `onto`: see linear."""
        if fused(n.x) and all(size % 8 == 0 for size in self.up.shape):
            from fairway.model.kernels.mlp_products import activated, mlp

            up = self.up.to(n.x.dtype)
            if not torch.is_grad_enabled():
                hidden_NF = activated(n.x.flatten(0, 1), n.factors, up)
                return linear(hidden_NF.view(*n.x.shape[:-1], -1), self.down, scale, onto)
            y_BTD: Tensor = mlp(n.x, up, scaled(self.down, scale, n.x.dtype))[0]
            return y_BTD
        hidden_BTF = F.leaky_relu(linear(n.tensor(), self.up), negative_slope=0.5).square()
        return linear(hidden_BTF, self.down, scale, onto)
