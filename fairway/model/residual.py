"""A layer and how it joins the residual stream: its MLP, the block of attention and MLP, U-Net skips, parallel lanes.

The MLP is LeakyReLU(0.5)², with no gate and no bias (PR #549, after the ReLU² of arXiv:2109.08668).

Legend: B rows, T tokens, X wanted places at the end of a row, D model width, F MLP width, K key/value heads, E width of
a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.attention import Attention
from fairway.model.config import ModelConfig
from fairway.model.context import Context, by_row, last_places, placed
from fairway.model.embedding import storage
from fairway.model.kernels import fused, in_place
from fairway.model.norm import Normed, join, norm, weighted_sum
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


class Block(nn.Module):
    """Attention, then MLP, on a stream that is first mixed with the embedding: u = mix[0]⊙x + mix[1]⊙x0.

    Both branches read a norm scaled by 1/√(index + 1), so that deeper layers add less, and what they put out is scaled
    per channel. It is added to the mixed stream u, not to x.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm_scale = (index + 1) ** -0.5
        self.attn = Attention(config, index)
        self.mlp = Mlp(config)
        self.resid_mix = nn.Parameter(torch.empty(2, config.width))
        self.attn_scale = nn.Parameter(torch.empty(config.width))
        self.mlp_scale = nn.Parameter(torch.empty(config.width))

    def forward(
        self,
        x_BTD: Tensor,
        context: Context,
        application: int,
        *,
        skip: tuple[Tensor, Tensor] | None = None,
        first_values: Tensor | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """From (B, T, D) to (B, X, D), and the first layer's raw values.

        `application` and what it counts: see context. `skip`: a saved output (B, T, D) and both its shares (Skips),
        merged in before everything. `first_values` and `wanted`: see Attention.forward.
        """
        u_BTD, n = self._mixed(x_BTD, context, skip)
        u_BXD = last_places(placed(u_BTD, context.rows_BT), wanted).contiguous()
        onto = u_BXD if in_place(u_BXD) else None
        attended_BXD, first_values = self.attend(
            n, context, application, first_values=first_values, wanted=wanted, onto=onto
        )
        if onto is not None:
            # u was changed into y, and y is changed into what comes out.
            n = norm(attended_BXD, self.norm_scale)
            return self.transform(n, context, application, onto=attended_BXD), first_values
        y_BXD, n = join([u_BXD, attended_BXD], None, self.norm_scale)
        return y_BXD + self.transform(n, context, application), first_values

    def _mixed(self, x_BTD: Tensor, context: Context, skip: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Normed]:
        """The mixed stream u, and its norm; both are by row where x is (see context.Context.rows_BT)."""
        mix = self.resid_mix.to(x_BTD.dtype)
        if skip is None:
            sources, weights = [x_BTD, context.x0_BTD], mix
        else:
            saved_BTD, shares = skip
            sources, weights = [x_BTD, saved_BTD, context.x0_BTD], torch.cat([mix[:1] * shares, mix[1:]])
        return join(sources, weights, self.norm_scale, None if by_row(x_BTD, context.rows_BT) else context.rows_BT)

    def attend(
        self,
        n: Normed,
        context: Context,
        application: int,
        *,
        first_values: Tensor | None = None,
        wanted: int | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention puts out for its input, scaled and with its adapters: as Attention.forward."""
        if context.adapters is not None:
            n = n.computed()
        return self.attn(n, self.attn_scale, context, application, first_values=first_values, wanted=wanted, onto=onto)

    def transform(self, n: Normed, context: Context, application: int, onto: Tensor | None = None) -> Tensor:
        """What the MLP puts out for its input (B, X, D), scaled and with its adapter; `onto`: see precision.linear."""
        if context.adapters is None:
            return self.mlp(n, self.mlp_scale, onto)
        n = n.computed()
        read_BXr = context.adapters.read(n.tensor(), "mlp", application)
        return context.adapters.onto(self.mlp(n, self.mlp_scale, onto), "mlp", application, read_BXr, self.mlp_scale)


class Skips(nn.Module):
    """U-Net skips: before decoder step j, the output of the j-th last encoder step joins the stream.

    Plain: x + weight[j]⊙saved. Gated (PR #1172): σ(gate[j])⊙x + (1 - σ(gate[j]))⊙weight[j]⊙saved. Rows count decoder
    steps and not layers, so that with depth recurrence a row serves other layers once looping is on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.skips, config.width)
        self.weight = nn.Parameter(torch.empty(shape))
        gate_dtype = storage(config.skip_gate_dtype)
        self.gate = nn.Parameter(torch.empty(shape, dtype=gate_dtype)) if config.skip == "gated" else None

    def forward(self, step: int, dtype: torch.dtype) -> Tensor:
        """What x and the saved output are multiplied by at decoder step `step`, (2, D) in `dtype`."""
        weight = self.weight[step].to(dtype)
        if self.gate is None:
            return torch.stack([torch.ones_like(weight), weight])
        kept = torch.sigmoid(self.gate[step].to(dtype))
        return torch.stack([kept, (1 - kept) * weight])


class Lanes(nn.Module):
    """Two residual lanes in the last layers: attention reads lane 0, the MLP lane 1, both write to both (PR #1855).

    In layer i, post[i, source, lane] multiplies what attention (source 0) or the MLP (source 1) adds to a lane, and
    resid[i, lane] multiplies the lane itself. The embedding is mixed into what attention reads, not into the lane. The
    rows of layers without lanes are never read; they exist because the record counts them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.post = nn.Parameter(torch.empty(config.layers, 2, 2))
        self.resid = nn.Parameter(torch.empty(config.layers, 2))

    def forward(
        self,
        block: Block,
        lanes: tuple[Tensor, Tensor],
        context: Context,
        application: int,
        *,
        skip: tuple[Tensor, Tensor] | None = None,
        first_values: Tensor | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both lanes, from (B, T, D) to (B, X, D), after the layer `block`; a skip joins lane 0.

        The other arguments as for Block.forward.
        """
        first, second = lanes
        if skip is not None:
            saved_BTD, shares = skip
            first = weighted_sum([first, saved_BTD], [shares[0], shares[1]])
        _, n = join([first, context.x0_BTD], block.resid_mix.to(first.dtype), block.norm_scale, context.rows_BT)
        attended, _ = block.attend(n, context, application, first_values=first_values, wanted=wanted)
        first, second = last_places(first, wanted), last_places(second, wanted)
        transformed = block.transform(norm(second, block.norm_scale), context, application)
        index = block.attn.index
        (a0, a1), (m0, m1) = self.post[index].to(attended.dtype)
        r0, r1 = self.resid[index].to(attended.dtype)
        return (
            weighted_sum([first, attended, transformed], [r0, a0, m0]),
            weighted_sum([second, attended, transformed], [r1, a1, m1]),
        )
