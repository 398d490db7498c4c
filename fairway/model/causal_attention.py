"""Causal softmax attention: within whole rows, within packed documents, or within a window that rolls along.

Legend: B rows, T tokens, X wanted places at the end of a row, H query heads, K key/value heads, G = H/K, E width of a
head, S segment bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.model.backends import (
    attention_backend,
    cudnn_attention,
    flash2_attention,
    flash3_attention,
    flash4_attention,
    recent_attention,
)

# The kernels of FlashAttention by the name that attention_backend gives them.
FLASH: dict[str, Callable[..., Any]] = {
    "flash2": flash2_attention,
    "flash3": flash3_attention,
    "flash4": flash4_attention,
}


def attend(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, segments: Tensor | None, *, longest: int | None = None
) -> Tensor:
    """Softmax attention to the same and earlier positions of a row, scale 1/√E; head h reads key/value head ⌊h/G⌋.

    With `segments` (S,) int32 no position sees another segment. It lists where segments start among the B·T tokens
    taken row after row, and then B·T, as often as padding needs; the start of a row always separates too. No segment
    may be longer than `longest` tokens, or than a row if that is None. q, k and v share a dtype, which the result
    (B, T, H, E) has too. Grouped heads: arXiv:2305.13245. What computes it: backends.attention_backend.
    """
    rows, length, _, head_dim = q_BTHE.shape
    backend = attention_backend(q_BTHE.device, q_BTHE.dtype, head_dim, length=length, packed=segments is not None)
    if backend == "plain":
        return attend_plainly(q_BTHE, k_BTKE, v_BTKE, segments)
    if backend == "cudnn":
        return cudnn_attention(q_BTHE, k_BTKE, v_BTKE)[0]
    attention = FLASH[backend]
    if segments is not None and rows > 1:
        starts = torch.arange(0, rows * length, length, device=segments.device, dtype=segments.dtype)
        segments = torch.cat([starts, segments]).sort().values
    return attention(q_BTHE, k_BTKE, v_BTKE, segments, min(length, longest or length))[0]


def attend_plainly(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, segments: Tensor | None) -> Tensor:
    """As `attend`, by PyTorch's own operator on any device: what the fast backends are tested against."""
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


def attend_recent(q_BXHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *, window: int) -> Tensor:
    """Attention of queries at the last X of T positions, each to the last `window` positions up to its own: o_BXHE.

    This is the sliding window of arXiv:2310.06825 (Mistral 7B). A window of T or more positions hides none, and each
    query then sees what it sees with `attend`.
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


@dataclass(frozen=True, eq=False)
class WithinRows:
    """The usual way to attend (context.Attend): each place sees itself and the places before it in its row.

    With `segments` and `longest`, for which see `attend`, it sees those of its own segment only, and the queries of all
    places must be there. Without, there may be queries of the last X places alone.
    """

    segments: Tensor | None = None
    longest: int | None = None

    def __call__(self, q_BXHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, application: int) -> Tensor:
        """Attention is the same in every application of a layer."""
        if q_BXHE.size(1) == k_BTKE.size(1):
            return attend(q_BXHE, k_BTKE, v_BTKE, self.segments, longest=self.longest)
        # The window has one place more than there are keys: where it hides no key at all, kernels mask less.
        return attend_recent(q_BXHE, k_BTKE, v_BTKE, window=k_BTKE.size(1) + 1)
