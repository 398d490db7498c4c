# mypy: disallow-untyped-defs=False
"""Attention in overlapping windows, where a token's query, key and value are the same in every window that holds it.

A query sees more keys in a window that starts earlier, and those it sees in a later window are among them. The kernel
goes from a query's block of keys back to earlier ones. Each time it reaches the start of a window, the sums so far are
the query's output in that window, which is stored. So one walk over T keys serves all T/spacing windows of a query.
A window's first places may have keys and values of their own: they are read only for that window's output.

Legend: W windows of T places that begin `spacing` apart; U rows of q, k and v: first those of the stretch of places
that the windows cover, then those that windows have for their own first places; H query heads, K key/value heads,
G = H/K, E width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest side of a product's tile, and the most places in a block.
SMALLEST, LARGEST_BLOCK = 16, 32


@triton.jit
def _seen(q, k, v, rows, causal, largest, total, sums, scale, K: tl.constexpr, E: tl.constexpr):
    """The queries' running maximum, sum of weights and weighted sum of values after one more block of keys."""
    at = rows[:, None] * K * E + tl.program_id(1) * E + tl.arange(0, E)
    scores = tl.where(causal, tl.dot(q, tl.load(k + at).T) * scale, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1))
    weights, kept = tl.exp2(scores - new[:, None]), tl.exp2(largest - new)
    sums = tl.dot(weights.to(q.dtype), tl.load(v + at), sums * kept[:, None])
    return new, total * kept + tl.sum(weights, axis=1), sums


@triton.jit
def _forward(
    q, k, v, rows, o, windows, spacing, scale,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries of a block of places: those of the G query heads at each place that read one key/value head."""
    block, key = tl.program_id(0), tl.arange(0, BLOCK)
    place, head = tl.arange(0, BLOCK * G) // G, tl.program_id(1) * G + tl.arange(0, BLOCK * G) % G
    part = head[:, None] * E + tl.arange(0, E)
    mine = tl.load(q + (block * BLOCK + place)[:, None] * K * G * E + part)
    largest = tl.full((BLOCK * G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK * G,), tl.float32)
    sums = tl.zeros((BLOCK * G, E), tl.float32)
    for back in range(min(T // BLOCK, block + 1)):
        start = (block - back) * BLOCK
        causal = (back > 0) | (place[:, None] >= key)
        if (start % spacing == 0) & (start // spacing < windows):
            window = (start // spacing).to(tl.int64) * T
            at = window + back * BLOCK + place
            own = tl.load(q + tl.load(rows + at)[:, None] * K * G * E + part)
            first = tl.load(rows + window + key)
            _, weight, values = _seen(own, k, v, first, causal, largest, total, sums, scale, K, E)
            tl.store(o + at[:, None] * K * G * E + part, values / weight[:, None])
        largest, total, sums = _seen(mine, k, v, start + key, causal, largest, total, sums, scale, K, E)


def block_size(spacing: int, length: int) -> int:
    """How many places a block has; windows of `length` places, `spacing` apart, then begin and end where blocks do."""
    return min(spacing & -spacing, length & -length, LARGEST_BLOCK)


@torch.library.custom_op("fairway::nested_attention", mutates_args=())
def nested_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, spacing: int) -> Tensor:
    """Causal attention within windows, (W, T, H, E), of q (1, U, H, E), k and v (1, U, K, E), contiguous.

    `rows` (W, T) int64 says which row of q, k and v stands at each place of each window. At place t of window w that is
    spacing·w + t, except at a window's first places, fewer than a block, which may have any row. There is no gradient,
    and the compiler does not know the operator's shapes.
    """
    windows, length = rows.shape
    (heads, width), kv_heads = q.shape[2:], k.size(2)
    block = block_size(spacing, length)
    o = q.new_empty(windows, length, heads, width)
    grid = (spacing * (windows - 1) + length) // block, kv_heads
    sizes = (length, kv_heads, heads // kv_heads, width, block)
    _forward[grid](q, k, v, rows, o, windows, spacing, 1.4427 * width**-0.5, *sizes)
    return o
