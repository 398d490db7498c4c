# mypy: disallow-untyped-defs=False
"""From the joint projection of queries, keys and values to what attention reads, in one pass over the data.

Legend: N tokens, H query heads, K key/value heads, S = H + 2K heads in all, E width of a head, R rotated pairs.

With z = x/√(mean(x²) + ε) per head, Rot the rotation of rope.py and g the gain of a query head (1 for keys):

    forward     y = g·Rot(z);  values are copied
    backward    t = Rotᵀ(dy);  dg = Σ t·z;  dx = (g·t − z·mean(g·t·z)) / √(mean(x²) + ε)

Rot runs in float32 here and its result is rounded once; the plain path rounds after each operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(2.0**-23)


@triton.jit
def _place(
    block, n_tokens, BLOCK: tl.constexpr, SLOTS: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr
):
    n = block * BLOCK + tl.arange(0, BLOCK)[:, None, None]
    head = tl.arange(0, SLOTS)[None, :, None]
    e = tl.arange(0, WIDTH)[None, None, :]
    return n, head, e, (n < n_tokens) & (head < S) & (e < E)


@triton.jit
def _turn(cos, sin, n, length, e, turned, R: tl.constexpr):
    """Cosine and signed sine of a channel's rotation, and the channel it is paired with."""
    at = (n % length) * R + e % R
    c = tl.load(cos + at, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)
    return c, tl.where(e < R, s, -s), tl.where(e < R, e + R, e - R)


@triton.jit
def _forward(
    qkv, cos, sin, gain, q, k, v, n_tokens, length,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = H + 2 * K
    n, head, e, inside = _place(tl.program_id(0).to(tl.int64), n_tokens, BLOCK, SLOTS, S, WIDTH, E)
    turned = inside & (head < H + K) & (e < 2 * R)
    c, s, partner = _turn(cos, sin, n, length, e, turned, R)
    row = qkv + (n * S + head) * E
    x = tl.load(row + e, mask=inside, other=0.0).to(tl.float32)
    paired = tl.load(row + partner, mask=turned, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / E + EPS)
    scale *= tl.load(gain + head, mask=head < H, other=1.0).to(tl.float32)
    y = tl.where(head < H + K, scale * (x * c + paired * s), x).to(q.dtype.element_ty)
    tl.store(q + (n * H + head) * E + e, y, mask=inside & (head < H))
    tl.store(k + (n * K + head - H) * E + e, y, mask=inside & (head >= H) & (head < H + K))
    tl.store(v + (n * K + head - H - K) * E + e, y, mask=inside & (head >= H + K))


@triton.jit
def _backward(
    dq, dk, dv, qkv, cos, sin, gain, dqkv, dgain, n_tokens, length,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = H + 2 * K
    block = tl.program_id(0).to(tl.int64)
    n, head, e, inside = _place(block, n_tokens, BLOCK, SLOTS, S, WIDTH, E)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + K), head >= H + K
    turned = inside & (head < H + K) & (e < 2 * R)
    c, s, partner = _turn(cos, sin, n, length, e, turned, R)
    q_row, k_row = dq + (n * H + head) * E, dk + (n * K + head - H) * E
    dy = tl.load(q_row + e, mask=inside & is_q, other=0.0) + tl.load(k_row + e, mask=inside & is_k, other=0.0)
    dy += tl.load(dv + (n * K + head - H - K) * E + e, mask=inside & is_v, other=0.0)
    paired = tl.load(q_row + partner, mask=turned & is_q, other=0.0)
    paired += tl.load(k_row + partner, mask=turned & is_k, other=0.0)
    t = dy.to(tl.float32) * c - paired.to(tl.float32) * s
    x = tl.load(qkv + (n * S + head) * E + e, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / E + EPS)
    z = x * rstd
    along = tl.sum(t * z, axis=2, keep_dims=True)
    g = tl.load(gain + head, mask=is_q, other=1.0).to(tl.float32)
    dx = tl.where(is_v, dy.to(tl.float32), g * rstd * (t - z * along / E))
    tl.store(dqkv + (n * S + head) * E + e, dx.to(dqkv.dtype.element_ty), mask=inside)
    # One row a block, summed by the caller: the same in every run.
    tl.store(dgain + block * H + head, tl.sum(along, axis=0, keep_dims=True), mask=is_q)


def _shape(qkv: Tensor, cos: Tensor, gain: Tensor, kv_heads: int) -> dict[str, int]:
    """Sizes of the kernels' tiles: BLOCK whole tokens, all heads, padded to powers of two."""
    heads = gain.numel()
    slots = heads + 2 * kv_heads
    width = qkv.size(-1) // slots
    padded = {"SLOTS": triton.next_power_of_2(slots), "WIDTH": triton.next_power_of_2(width)}
    return {"H": heads, "K": kv_heads, "E": width, "R": cos.size(-1), "BLOCK": 2} | padded


@torch.library.custom_op("fairway::heads", mutates_args=())
def heads(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, H, E), normed, rotated and gained, keys (B, T, K, E), normed and rotated, and values, untouched.

    qkv (B, T, (H + 2K)·E) contiguous, cos and sin (T, 1, R), gain (H,).
    """
    q, k, v = _empty(qkv, gain, kv_heads)
    sizes = _shape(qkv, cos, gain, kv_heads)
    n_tokens, length = qkv[..., 0].numel(), qkv.size(1)
    grid = (triton.cdiv(n_tokens, sizes["BLOCK"]),)
    _forward[grid](qkv, cos, sin, gain, q, k, v, n_tokens, length, **sizes)
    return q, k, v


def _empty(qkv: Tensor, gain: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = gain.numel()
    rows, length, width = qkv.shape
    width //= heads + 2 * kv_heads
    q = qkv.new_empty(rows, length, heads, width)
    k = qkv.new_empty(rows, length, kv_heads, width)
    return q, k, torch.empty_like(k)


heads.register_fake(lambda qkv, cos, sin, gain, kv_heads: _empty(qkv, gain, kv_heads))


@torch.library.custom_op("fairway::heads_backward", mutates_args=())
def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, in its dtype, and of the gain, float32."""
    dqkv = torch.empty_like(qkv)
    sizes = _shape(qkv, cos, gain, kv_heads)
    n_tokens, length = qkv[..., 0].numel(), qkv.size(1)
    blocks = triton.cdiv(n_tokens, sizes["BLOCK"])
    dgain = gain.new_empty(blocks, gain.numel(), dtype=torch.float32)
    arguments = (dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv, cos, sin, gain, dqkv, dgain, n_tokens, length)
    _backward[(blocks,)](*arguments, **sizes)
    return dqkv, dgain.sum(0)


@heads_backward.register_fake
def _(dq, dk, dv, qkv, cos, sin, gain, kv_heads):
    return torch.empty_like(qkv), torch.empty_like(gain, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    qkv, cos, sin, gain, ctx.kv_heads = inputs
    ctx.save_for_backward(qkv, cos, sin, gain)


def _gradients(ctx, dq, dk, dv):
    qkv, cos, sin, gain = ctx.saved_tensors
    dqkv, dgain = heads_backward(dq, dk, dv, qkv, cos, sin, gain, ctx.kv_heads)
    return dqkv, None, None, dgain.to(gain.dtype), None


heads.register_autograd(_gradients, setup_context=_save)
