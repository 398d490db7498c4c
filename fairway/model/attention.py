"""Causal attention with grouped key/value heads, and the mechanisms the records hang on it.

Legend: B rows, T tokens, D model width, H query heads, K key/value heads, G = H/K, E width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.backends import (
    attention_backend,
    cudnn_attention,
    flash2_attention,
    flash4_attention,
    recent_attention,
)
from fairway.model.config import ModelConfig
from fairway.model.kernels import fused, powers_of_two
from fairway.model.norm import Normed
from fairway.model.precision import linear, rms_norm
from fairway.model.rope import rotate


def attend(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, segments: Tensor | None, *, longest: int | None = None
) -> Tensor:
    """Softmax attention to the same and earlier positions of a row, scale 1/√E; head h reads key/value head ⌊h/G⌋.

    `segments` (S,) int32, or None, holds the starts of the segments of the B·T tokens taken in order, then B·T (as
    often as padding needs): no position sees another segment, and none another row. No segment may be longer than
    `longest`, or a row if that is None. q, k and v share a dtype; the result o_BTHE has it too. Grouped heads:
    arXiv:2305.13245. What computes it: model.backends.attention_backend.
    """
    rows, length = q_BTHE.shape[:2]
    backend = attention_backend(q_BTHE.device, q_BTHE.dtype, length=length, packed=segments is not None)
    if backend == "plain":
        return _attend_plainly(q_BTHE, k_BTKE, v_BTKE, segments)
    if backend == "cudnn":
        return cudnn_attention(q_BTHE, k_BTKE, v_BTKE)[0]
    attention = {"flash2": flash2_attention, "flash4": flash4_attention}[backend]
    if segments is not None and rows > 1:
        starts = torch.arange(0, rows * length, length, device=segments.device, dtype=segments.dtype)
        segments = torch.cat([starts, segments]).sort().values
    return attention(q_BTHE, k_BTKE, v_BTKE, segments, min(length, longest or length))[0]


def attend_recent(q_BXHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *, window: int) -> Tensor:
    """Attention of the last X of T positions, each to the last `window` positions up to its own: o_BXHE, no gradient.

    The window is that of arXiv:2310.06825 (Mistral 7B); one of T or more is all that `attend` sees.
    """
    if q_BXHE.is_cuda and q_BXHE.dtype == torch.bfloat16:
        return recent_attention(q_BXHE, k_BTKE, v_BTKE, window)
    queries, length = q_BXHE.size(1), k_BTKE.size(1)
    pieces = []
    # As many queries at a time as a window has places, so that no more than half of the scores are masked.
    for begin in range(length - queries, length, window):
        end, first = min(begin + window, length), max(begin - window + 1, 0)
        position = torch.arange(first, end, device=q_BXHE.device)
        back = position[begin - first :, None] - position
        q = q_BXHE[:, begin - (length - queries) : end - (length - queries)]
        q, k, v = (x.transpose(1, 2) for x in (q, k_BTKE[:, first:end], v_BTKE[:, first:end]))
        mask = (back >= 0) & (back < window)
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2))
    return torch.cat(pieces, 1)


def _attend_plainly(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, segments: Tensor | None) -> Tensor:
    mask = None if segments is None else _segment_mask(segments, *q_BTHE.shape[:2])
    o_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return o_BHTE.transpose(1, 2)


def _segment_mask(segments: Tensor, rows: int, length: int) -> Tensor:
    """(B, 1, T, T) bool: may this query (dim 2) see this key (dim 3)?"""
    tokens = torch.arange(rows * length, device=segments.device, dtype=segments.dtype)
    segment_BT = torch.searchsorted(segments, tokens, right=True).view(rows, length)
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def exclude_self(o_BTHE: Tensor, v_BTKE: Tensor, gate_BTH: Tensor | None = None) -> Tensor:
    """Exclusive self-attention (XSA, arXiv:2603.09078): remove from each head's output what points along the own value.

    Then times the gate, if there is one. In float32 and returned in the dtype of `o`. Nothing is detached: the gradient
    also flows through the direction.
    """
    if fused(o_BTHE) and powers_of_two(*o_BTHE.shape[2:], v_BTKE.size(2)):
        from fairway.model.kernels.exclusive import exclusive

        return exclusive(o_BTHE.contiguous(), v_BTKE.contiguous(), gate_BTH)
    direction_BTK1E = F.normalize(v_BTKE.float(), dim=-1)[:, :, :, None]
    o_BTKGE = o_BTHE.float().unflatten(2, (v_BTKE.size(2), -1))
    along = (o_BTKGE * direction_BTK1E).sum(-1, keepdim=True)
    rest_BTHE = (o_BTKGE - along * direction_BTK1E).flatten(2, 3)
    return (rest_BTHE if gate_BTH is None else gate_BTH[..., None] * rest_BTHE).to(o_BTHE.dtype)


@dataclass
class Shared:
    """What the layers of one forward pass have in common.

    Where places have rows of x0 in common, as overlapping windows have, x0 and what is computed from it alone up to the
    first layer's attention is kept by row: (1, U, ...), U > T.
    """

    x0_BTD: Tensor
    # Cosines and sines (model.rope) of a row's T places, or of U, the first of which are T places of a row.
    rope: tuple[Tensor, Tensor]
    segments: Tensor | None
    # No segment has more tokens.
    longest: int
    # Added to the values of the layers that have an entry, (B, T, K·E) each.
    value_embeddings: dict[int, Tensor]
    # Which row of x0 each place reads, (B, T) int64: b's from b times the spacing on, but for its first ones.
    rows_BT: Tensor | None = None
    spacing: int = 0
    # How many places at the end of each row are wanted, for less work and without a gradient; None: all.
    last: int | None = None
    # The first layer's values (B, T, K, E), left by it for the later ones.
    first_values: Tensor | None = None
    # Whether this is the last layer: to it, places that are not wanted matter as keys and values alone.
    ending: bool = False

    def by_row(self, x: Tensor) -> bool:
        """Whether this is (1, U, ...)."""
        return self.rows_BT is not None and x.size(1) > self.rows_BT.size(1)

    def placed(self, x: Tensor) -> Tensor:
        """(B, T, ...), also of what is kept by row."""
        return x[0][self.rows_BT] if self.by_row(x) else x

    def wanted(self, x_BTD: Tensor) -> Tensor:
        """The places of (B, T, ...) that are wanted of this layer."""
        return x_BTD if self.last is None or not self.ending else x_BTD[:, -self.last :]


def attend_nested(q_1UHE: Tensor, k_1UKE: Tensor, v_1UKE: Tensor, shared: Shared) -> Tensor:
    """As `attend` within overlapping windows, of what is kept by row: o_BTHE, without a gradient."""
    assert shared.rows_BT is not None
    if fused(q_1UHE) and powers_of_two(*q_1UHE.shape[2:], k_1UKE.size(2)):
        from fairway.model.kernels.nested import SMALLEST, block_size, nested_attention

        if min(block_size(shared.spacing, shared.rows_BT.size(1)), q_1UHE.size(3)) >= SMALLEST:
            return nested_attention(q_1UHE, k_1UKE, v_1UKE, shared.rows_BT, shared.spacing)
    q_BTHE, k_BTKE, v_BTKE = map(shared.placed, (q_1UHE, k_1UKE, v_1UKE))
    return attend(q_BTHE, k_BTKE, v_BTKE, None)


class Attention(nn.Module):
    """One layer's attention: normed input in, output projection out, both (B, T, D).

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

    def forward(self, n: Normed, scale: Tensor, shared: Shared, onto: Tensor | None = None) -> Tensor:
        """Attend within the rows (or segments) of the normed and scaled input; times `scale` (D,), at wanted places.

        `onto`: see linear; it may be what `n` is the norm of.
        """
        q, k, v = self._project(n, shared)
        v_BTKE = self._values(shared.placed(v), shared)
        if shared.by_row(q) and self.index not in shared.value_embeddings:
            o_BTHE = attend_nested(q, k, v, shared)
        else:
            o_BTHE = self._attend(shared.placed(q), shared.placed(k), v_BTKE, shared)
        v_BTKE, gate_BTH = shared.wanted(v_BTKE), None
        if self.gate_w is not None:
            read_BTC = shared.wanted(shared.placed(n.tensor(self.gate_w.size(1))))
            gate_BTH = torch.sigmoid(self.gate_scale * linear(read_BTC, self.gate_w))
        if self.exclusive:
            o_BTHE = exclude_self(o_BTHE, v_BTKE, gate_BTH)
        elif gate_BTH is not None:
            o_BTHE = gate_BTH[..., None] * o_BTHE
        return linear(o_BTHE.flatten(2), self.o, scale, onto)

    def _attend(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, shared: Shared) -> Tensor:
        """Attention itself; what remembers earlier keys and values puts its own in this place."""
        if shared.last is not None and shared.ending:
            # One place more than there are: where no key lies outside of the window, kernels mask less.
            return attend_recent(q_BTHE, k_BTKE, v_BTKE, window=k_BTKE.size(1) + 1)
        return attend(q_BTHE, k_BTKE, v_BTKE, shared.segments, longest=shared.longest)

    def _project(self, n: Normed, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of wanted places, normed, rotated and gained, keys, normed and rotated, and raw values, by head."""
        cos, sin = (table_T1R[: n.x.size(1)] for table_T1R in shared.rope)
        if fused(n.x):
            from fairway.model.kernels.heads import fits, heads

            kv_heads, gain = self.k.size(0) // self.head_dim, self.q_gain.to(n.x.dtype)
            if fits(gain.numel(), kv_heads, self.head_dim, cos.size(-1)):
                few = shared.last is not None and shared.ending
                weight = torch.cat((self.k, self.v) if few else (self.q, self.k, self.v)).to(n.x.dtype)
                q_BTHE, *others = heads(n.x, n.factors, weight, cos, sin, gain[:0] if few else gain, kv_heads)
                return self._queries(n, shared) if few else q_BTHE, others[0], others[1]
        n_BTD = n.tensor()
        k_BTKE = rotate(rms_norm(linear(n_BTD, self.k).unflatten(2, (-1, self.head_dim))), (cos, sin))
        return self._queries(n, shared), k_BTKE, linear(n_BTD, self.v).unflatten(2, (-1, self.head_dim))

    def _queries(self, n: Normed, shared: Shared) -> Tensor:
        cos, sin = (shared.wanted(table_T1R[None, : n.x.size(1)]) for table_T1R in shared.rope)
        q_BTHE = linear(n.map(shared.wanted).tensor(), self.q).unflatten(2, (-1, self.head_dim))
        return rotate(rms_norm(q_BTHE), (cos, sin)) * self.q_gain.to(n.x.dtype)[:, None]

    def _values(self, v_BTKE: Tensor, shared: Shared) -> Tensor:
        """The layer's own values plus the value embedding, then mixed with the first layer's raw ones."""
        if self.leaves_values:
            shared.first_values = v_BTKE
        if self.index in shared.value_embeddings:
            v_BTKE = v_BTKE + shared.value_embeddings[self.index].view_as(v_BTKE)
        if self.vrl_gate is None:
            return v_BTKE
        assert shared.first_values is not None, "layer 0 runs before any layer with a value residual"
        return torch.lerp(v_BTKE, shared.first_values, torch.sigmoid(self.vrl_gate.to(v_BTKE.dtype)))
