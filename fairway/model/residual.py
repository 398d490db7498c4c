"""How layers join the residual stream: the block, U-Net skips and parallel lanes.

Legend: B rows, T tokens, D model width, L layers, S skips.
"""

import torch
from torch import Tensor, nn

from fairway.model.attention import Attention, Shared
from fairway.model.config import ModelConfig
from fairway.model.embedding import storage
from fairway.model.kernels import in_place
from fairway.model.mlp import Mlp
from fairway.model.norm import join, norm


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

    def forward(self, x_BTD: Tensor, shared: Shared, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, T, D) to (B, T, D), or the places wanted of it.

        `skip`: a saved output and both its shares (Skips), merged in before everything.
        """
        mix = self.resid_mix.to(x_BTD.dtype)
        if skip is None:
            sources, weights = [x_BTD, shared.x0_BTD], mix
        else:
            saved_BTD, shares = skip
            sources, weights = [x_BTD, saved_BTD, shared.x0_BTD], torch.cat([mix[:1] * shares, mix[1:]])
        u_BTD, n = join(sources, weights, self.norm_scale, None if shared.by_row(x_BTD) else shared.rows_BT)
        u_BTD = shared.wanted(shared.placed(u_BTD)).contiguous()
        if in_place(u_BTD):
            # u becomes y, and y what comes out.
            y_BTD = self.attn(n, self.attn_scale, shared, u_BTD)
            return self.mlp(norm(y_BTD, self.norm_scale), self.mlp_scale, y_BTD)
        y_BTD, n = join([u_BTD, self.attn(n, self.attn_scale, shared)], None, self.norm_scale)
        return y_BTD + self.mlp(n, self.mlp_scale)


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

    def forward(self, step: int, dtype: torch.dtype) -> Tensor:
        """The shares of x and of what was saved at row `step`, (2, D) in `dtype`."""
        weight = self.weight[step].to(dtype)
        if self.gate is None:
            return torch.stack([torch.ones_like(weight), weight])
        kept = torch.sigmoid(self.gate[step].to(dtype))
        return torch.stack([kept, (1 - kept) * weight])


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
        """Both lanes (B, T, D) after the layer `block`, or the places wanted of them."""
        mix = block.resid_mix.to(lanes[0].dtype)
        _, n = join([lanes[0], shared.x0_BTD], mix, block.norm_scale, shared.rows_BT)
        attention = block.attn(n, block.attn_scale, shared)
        first, second = shared.wanted(lanes[0]), shared.wanted(lanes[1])
        mlp = block.mlp(norm(second, block.norm_scale), block.mlp_scale)
        index = block.attn.index
        (a0, a1), (m0, m1) = self.post[index].to(attention.dtype)
        r0, r1 = self.resid[index].to(attention.dtype)
        return r0 * first + a0 * attention + m0 * mlp, r1 * second + a1 * attention + m1 * mlp
