"""How layers join the residual stream: the block, U-Net skips and parallel lanes.

Legend: B rows, T tokens, D model width, L layers, S skips.
"""

import torch
from torch import Tensor, nn

from model.attention import Attention, Shared
from model.config import ModelConfig
from model.embedding import storage
from model.mlp import Mlp
from model.precision import rms_norm


class Block(nn.Module):
    """Attention, then MLP, on a stream that is first mixed with the embedding: u = mix[0]⊙x + mix[1]⊙x0.

    Both branches read a norm scaled by 1/√(index + 1), so deeper layers speak more softly, and are scaled per channel.
    The residual base is the mixed stream u, not x.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm_scale = (index + 1) ** -0.5
        self.attn = Attention(config, index)
        self.mlp = Mlp(config)
        self.resid_mix = nn.Parameter(torch.empty(2, config.width))
        self.attn_scale = nn.Parameter(torch.empty(config.width))
        self.mlp_scale = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BTD: Tensor, shared: Shared) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        u_BTD = self.mix(x_BTD, shared.x0_BTD)
        y_BTD = u_BTD + self.attention_branch(u_BTD, shared)
        return y_BTD + self.mlp_branch(y_BTD)

    def mix(self, x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        """The stream with some of the embedding mixed back in."""
        of_x, of_x0 = self.resid_mix.to(x_BTD.dtype)
        return of_x * x_BTD + of_x0 * x0_BTD

    def attention_branch(self, u_BTD: Tensor, shared: Shared) -> Tensor:
        """What attention adds, read from `u`."""
        return self.attn_scale.to(u_BTD.dtype) * self.attn(self.norm_scale * rms_norm(u_BTD), shared)

    def mlp_branch(self, y_BTD: Tensor) -> Tensor:
        """What the MLP adds, read from `y`."""
        return self.mlp_scale.to(y_BTD.dtype) * self.mlp(self.norm_scale * rms_norm(y_BTD))


class Skips(nn.Module):
    """U-Net skips: before decoder step j, the output of the j-th last encoder step joins the stream.

    Plain: x + weight[j]⊙saved. Gated (PR #1172): σ(gate[j]) keeps that share of x and lets in the rest of
    weight[j]⊙saved. Rows count decoder steps, so with depth recurrence they serve other layers once looping is on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.skips, config.width)
        self.weight = nn.Parameter(torch.empty(shape))
        gate_dtype = storage(config.skip_gate_dtype)
        self.gate = nn.Parameter(torch.empty(shape, dtype=gate_dtype)) if config.skip == "gated" else None

    def forward(self, step: int, x_BTD: Tensor, saved_BTD: Tensor) -> Tensor:
        """The stream with `saved` merged in; `step` is the row."""
        saved_BTD = self.weight[step].to(x_BTD.dtype) * saved_BTD
        if self.gate is None:
            return x_BTD + saved_BTD
        return torch.lerp(saved_BTD, x_BTD, torch.sigmoid(self.gate[step].to(x_BTD.dtype)))


class Lanes(nn.Module):
    """Two residual lanes in the last layers: attention reads lane 0, the MLP lane 1, both write to both (PR #1855).

    post[i, source, lane] weighs what attention (source 0) and MLP (source 1) of layer i add; resid[i, lane] the lane
    itself, which is the raw one: the embedding is mixed into attention's reading only. Rows of layers without lanes
    are never read; they exist because the record counts them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.post = nn.Parameter(torch.empty(config.layers, 2, 2))
        self.resid = nn.Parameter(torch.empty(config.layers, 2))

    def forward(self, block: Block, lanes: tuple[Tensor, Tensor], shared: Shared) -> tuple[Tensor, Tensor]:
        """Both lanes (B, T, D) after the layer `block`."""
        attention = block.attention_branch(block.mix(lanes[0], shared.x0_BTD), shared)
        mlp = block.mlp_branch(lanes[1])
        index = block.attn.index
        (a0, a1), (m0, m1) = self.post[index].to(attention.dtype)
        r0, r1 = self.resid[index].to(attention.dtype)
        return r0 * lanes[0] + a0 * attention + m0 * mlp, r1 * lanes[1] + a1 * attention + m1 * mlp
