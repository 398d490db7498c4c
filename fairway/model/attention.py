"""The attention of a layer: rotary positions, grouped key/value heads and the mechanisms that the records add to it.

Rotary position embedding (RoPE, arXiv:2104.09864) turns the first channels of each head by an angle that grows with the
position.

Legend: B rows, T tokens, X wanted places at the end of a row, D model width, H query heads, K key/value heads,
G = H/K, E width of a head, R rotated pairs, C channels that a gate reads, O outputs side by side, r numbers that an
adapter reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.config import ModelConfig, Rope
from fairway.model.context import Context, Projection, last_places, placed
from fairway.model.kernels import fused, powers_of_two
from fairway.model.norm import Normed
from fairway.model.precision import linear, rms_norm


def frequencies(rope: Rope, length: int, device: torch.device) -> Tensor:
    """Radians per position, (R,) float32, for rows of `length` tokens.

    Rows longer than `reference_len` stretch the base, so that the slowest pair turns no further than it does in a row
    of that length (NTK-aware scaling by u/bloc97; PR #1150). PR #1855 keeps the frequencies in a buffer that a cast of
    the whole network has rounded to bfloat16: part of the trained network, since positions run to 98303.
    """
    base = rope.base
    if rope.reference_len is not None and length > rope.reference_len:
        base *= (length / rope.reference_len) ** (rope.dims / (rope.dims - 2))
    # In float64, so that every device rounds to the same float32.
    exponents = torch.arange(0, rope.dims, 2, device=device, dtype=torch.float64) / rope.dims
    omega = (base**-exponents).float()
    return omega.bfloat16().float() if rope.bf16_frequencies else omega


def rotary_table(rope: Rope, length: int, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at positions of rows of `length` tokens, each (T, 1, R), rounded to `dtype`.

    Angles have the dtype of the positions: float32, as in the records, or float64 where they go far beyond a row. The
    records count positions from 0 at the start of the row, also where a packed row holds several documents.
    """
    angles = torch.outer(positions_T, frequencies(rope, length, positions_T.device).to(positions_T.dtype))[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (j, j + R) of each head by minus their angle; channels from 2R on pass through."""
    cos, sin = table
    pairs = cos.size(-1)
    first, second, rest = x_BTHE.split([pairs, pairs, x_BTHE.size(-1) - 2 * pairs], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def exclude_self(o_BTHE: Tensor, v_BTKE: Tensor, gate_BTH: Tensor | None = None) -> Tensor:
    """Exclusive self-attention (XSA, arXiv:2603.09078): remove from each head's output what points along the own value.

    The rest is multiplied by the gate, if there is one. All this is done in float32 and returned in the dtype of `o`.
    Nothing is detached: the gradient also flows through the direction.
    """
    if fused(o_BTHE) and powers_of_two(*o_BTHE.shape[2:], v_BTKE.size(2)):
        from fairway.model.kernels.exclusive import exclusive

        return exclusive(o_BTHE.contiguous(), v_BTKE.contiguous(), gate_BTH)
    direction_BTK1E = F.normalize(v_BTKE.float(), dim=-1)[:, :, :, None]
    o_BTKGE = o_BTHE.float().unflatten(2, (v_BTKE.size(2), -1))
    along = (o_BTKGE * direction_BTK1E).sum(-1, keepdim=True)
    rest_BTHE = (o_BTKGE - along * direction_BTK1E).flatten(2, 3)
    return (rest_BTHE if gate_BTH is None else gate_BTH[..., None] * rest_BTHE).to(o_BTHE.dtype)


def finished_queries(q_BXHE: Tensor, rope: tuple[Tensor, Tensor], gain_H: Tensor) -> Tensor:
    """Queries of the last places, normed, rotated and gained, in their dtype."""
    cos, sin = (table_T1R[-q_BXHE.size(1) :] for table_T1R in rope)
    return rotate(rms_norm(q_BXHE), (cos, sin)) * gain_H.to(q_BXHE.dtype)[:, None]


class Attention(nn.Module):
    """One layer's attention, from its normed input (B, T, D) to its output projection.

    Queries and keys are normed per head and rotated; queries then carry a learned gain per head, so that an attention
    logit is gain·√E·cos∠(q, k). By config: values mixed with the first layer's (arXiv:2410.17897; PR #1313), XSA in
    the last layers (PR #549), and a gate on each head's output that reads a few input channels (PR #1855).
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.index, self.head_dim = index, config.head_dim
        self.q = nn.Parameter(torch.empty(width, width))
        self.k = nn.Parameter(torch.empty(kv_width, width))
        self.v = nn.Parameter(torch.empty(kv_width, width))
        self.o = nn.Parameter(torch.empty(width, width))
        self.q_gain = nn.Parameter(torch.empty(config.heads))
        self.exclusive = index >= config.layers - config.xsa_last_layers
        self.leaves_values = config.value_residual and index == 0
        self.vrl_gate = nn.Parameter(torch.empty(())) if config.value_residual and index > 0 else None
        gate = config.attn_gate
        self.gate_scale = gate.scale if gate else 1.0
        self.gate_w = nn.Parameter(torch.empty(config.heads, gate.window)) if gate else None

    def forward(
        self,
        n: Normed,
        scale: Tensor,
        context: Context,
        application: int,
        *,
        first_values: Tensor | None = None,
        wanted: int | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, X, D) of the normed and scaled input, times `scale` (D,), and the first layer's raw values.

        `first_values` (B, T, K, E) are what the first layer returned, None to that layer itself and wherever values are
        not mixed. `wanted`: X, or None for all T places. `onto`: see precision.linear; it may be what `n` is the norm
        of.
        """
        p = self._project(n, context, application, wanted)
        v, v_BTKE = p.v, placed(p.v, context.rows_BT)
        if self.leaves_values:
            first_values = v_BTKE
        if self.vrl_gate is not None or self.index in context.value_embeddings:
            v = v_BTKE = self._mixed(v_BTKE, context, first_values)
        o_BXHE = context.attend(p.q, p.k, v, application)
        o_BXHE = self._finished(o_BXHE, last_places(v_BTKE, wanted), p.gate_BTC)
        y_BXD = linear(o_BXHE.flatten(2), self.o, scale, onto)
        if context.adapters is not None and p.read_BXr is not None:
            y_BXD = context.adapters.onto(y_BXD, "o", application, p.read_BXr, scale)
        return y_BXD, first_values

    def _project(self, n: Normed, context: Context, application: int, wanted: int | None) -> Projection:
        """The projections of the input, and what adapters add to them."""
        cos, sin = (table_T1R[: n.x.size(1)] for table_T1R in context.rope)
        rope, channels = (cos, sin), 0 if self.gate_w is None else self.gate_w.size(1)
        if context.adapters is not None:
            weights = (self.q, self.k, self.v)
            return context.adapters.projections(
                n.tensor(), weights, self.q_gain, rope, application, wanted=wanted, channels=channels
            )
        gate_BTC = placed(n.tensor(channels), context.rows_BT) if channels else None
        if self._has_kernel(n.x, rope[0].size(-1)):
            return Projection(*self._project_fused(n, rope, wanted), gate_BTC)
        read = n if wanted is None else n.last(wanted)
        q, k, v = (
            linear(x.tensor(), weight).unflatten(2, (-1, self.head_dim))
            for x, weight in ((read, self.q), (n, self.k), (n, self.v))
        )
        return Projection(finished_queries(q, rope, self.q_gain), rotate(rms_norm(k), rope), v, gate_BTC)

    def _has_kernel(self, x: Tensor, pairs: int) -> bool:
        """Whether the fused kernels of the projections take this input and these shapes."""
        if not fused(x):
            return False
        from fairway.model.kernels.heads import fits

        return fits(self.q_gain.numel(), self.k.size(0) // self.head_dim, self.head_dim, pairs)

    def _project_fused(
        self, n: Normed, rope: tuple[Tensor, Tensor], wanted: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As _project, by the fused kernel; where queries of few places are wanted, it makes keys and values alone."""
        from fairway.model.kernels.heads import heads

        gain, kv_heads = self.q_gain.to(n.x.dtype), self.k.size(0) // self.head_dim
        if wanted is None:
            weight = torch.cat((self.q, self.k, self.v)).to(n.x.dtype)
            q_BTHE, k_BTKE, v_BTKE, _ = heads(n.x, n.factors, weight, *rope, gain, kv_heads)
            return q_BTHE, k_BTKE, v_BTKE
        weight = torch.cat((self.k, self.v)).to(n.x.dtype)
        _, k_BTKE, v_BTKE, _ = heads(n.x, n.factors, weight, *rope, gain[:0], kv_heads)
        q_BXHE = linear(n.last(wanted).tensor(), self.q).unflatten(2, (-1, self.head_dim))
        return finished_queries(q_BXHE, rope, self.q_gain), k_BTKE, v_BTKE

    def _mixed(self, v_BTKE: Tensor, context: Context, first_values: Tensor | None) -> Tensor:
        """The layer's own values plus its value embedding, then mixed with the first layer's raw ones."""
        if self.index in context.value_embeddings:
            v_BTKE = v_BTKE + context.value_embeddings[self.index].view_as(v_BTKE)
        if self.vrl_gate is None:
            return v_BTKE
        assert first_values is not None, "layer 0 runs before any layer with a value residual"
        return torch.lerp(v_BTKE, first_values, torch.sigmoid(self.vrl_gate.to(v_BTKE.dtype)))

    def _finished(self, o_BXHE: Tensor, v_BXKE: Tensor, gate_BTC: Tensor | None) -> Tensor:
        """The heads' outputs without what points along their own value, and gated, as the config has it."""
        gate_BXH = None
        if gate_BTC is not None and self.gate_w is not None:
            gate_BXH = torch.sigmoid(self.gate_scale * linear(gate_BTC[:, -o_BXHE.size(1) :], self.gate_w))
        if self.exclusive:
            return exclude_self(o_BXHE, v_BXKE, gate_BXH)
        return o_BXHE if gate_BXH is None else gate_BXH[..., None] * o_BXHE
