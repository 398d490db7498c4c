"""The MLP of a layer: LeakyReLU(0.5)², no gate, no bias (PR #549, after the ReLU² of arXiv:2109.08668).

Legend: B rows, T tokens, D model width, F MLP width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import fused
from model.precision import linear, scaled


class Mlp(nn.Module):
    """W_down·φ(W_up·n) with φ(p) = p² for p > 0 and p²/4 below."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.mlp_hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_hidden))

    def forward(self, n_BTD: Tensor, scale: Tensor) -> Tensor:
        """From the normed and scaled input, (B, T, D) to (B, T, D), times `scale` (D,)."""
        if fused(n_BTD) and self.up.size(0) % 8 == 0 and self.up.size(1) % 8 == 0:
            from model.kernels.mlp import mlp

            up, down = self.up.to(n_BTD.dtype), scaled(self.down, scale, n_BTD.dtype)
            return mlp(n_BTD.flatten(0, 1), up, down)[0].view_as(n_BTD)
        hidden_BTF = F.leaky_relu(linear(n_BTD, self.up), negative_slope=0.5).square()
        return linear(hidden_BTF, self.down, scale)
