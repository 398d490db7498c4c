# mypy: disallow-untyped-defs=False
# mypy: disallow-untyped-defs=False
"""Attention in overlapping windows whose queries, keys and values are the same wherever a token stands in them.

Legend: W windows of T places, `spacing` apart; U rows of q, k and v, the first of which are the places of the stretch
that they cover; H query heads, K key/value heads, G = H/K, E width of a head.

What a window adds to a query's sums lies between the window's start and the next one's: going back from a query, block
of keys by block, its output in every window that holds it is one stop on the way. So T keys a query do for T/spacing
windows at once. A window's first places may have rows of their own, which its last stop reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sides of a product's tiles are no smaller, blocks of places no larger.
SMALLEST, LARGEST_BLOCK = 16, 32


@triton.jit
def _seen(q, k, v, rows, causal, largest, total, sums, scale, K: tl.constexpr, E: tl.constexpr):
    """The running maximum, sum of weights and weighted values of the queries after one more block of keys."""
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
    """A block of the stretch's places as queries of one key/value head, G at each place."""
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
    """Places of a block, such that windows of `length` places begin and end where blocks do."""
    return min(spacing & -spacing, length & -length, LARGEST_BLOCK)


@torch.library.custom_op("fairway::nested_attention", mutates_args=())
def nested_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, spacing: int) -> Tensor:
    """Causal attention within windows, (W, T, H, E), of q (1, U, H, E), k and v (1, U, K, E), contiguous.

    `rows` (W, T) int64 says which row stands at each place: window w's from spacing·w on, but for its first ones,
    whose rows may be others. No gradient, and not for the compiler.
    """
    windows, length = rows.shape
    (heads, width), kv_heads = q.shape[2:], k.size(2)
    block = block_size(spacing, length)
    o = q.new_empty(windows, length, heads, width)
    grid = (spacing * (windows - 1) + length) // block, kv_heads
    sizes = (length, kv_heads, heads // kv_heads, width, block)
    _forward[grid](q, k, v, rows, o, windows, spacing, 1.4427 * width**-0.5, *sizes)
    return o
