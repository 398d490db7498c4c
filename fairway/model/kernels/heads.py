# mypy: disallow-untyped-defs=False
"""Queries, keys and values as attention reads them, finished where their joint projection puts out its tiles.

Where adapters add to what the projection puts out, they are finished by a pass of their own behind that.

Legend: N tokens, D width, H query heads, K key/value heads, S = H + 2K in all, E width of a head, R rotated pairs.

With x = n·Wᵀ by head, z = x/√(mean(x²) + ε), Rot the rotation of attention.py, g the gain of a query head (1 for keys):

    forward     y = g·Rot(z);  values are x
    backward    t = Rotᵀ(dy);  dg = Σ t·z;  dx = (g·t − z·mean(g·t·z)) / √(mean(x²) + ε);  dn = dx·W;  dW = dxᵀ·n

x is rounded to bfloat16 as if it had been stored, which it is only for the backward pass. Rot runs in float32 and its
result is rounded once; the plain path rounds after each operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fairway.model.kernels import powers_of_two
from fairway.model.kernels.tiles import halves, programs, read

EPS = tl.constexpr(2.0**-23)
# Rows of a tile of the product, which is two heads wide, and the depth of a step towards it. Tokens of a tile of the
# backward pass.
ROWS, DEPTH, BLOCK = 128, 64, 4


@triton.jit
def _finish(
    product, c, s, gain, x_out, q, k, v, n, head,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put out one head of a tile."""
    stored = product.to(q.dtype)
    if x_out is not None:
        x_out.store([n, head * E], stored)
    if head >= H + K:
        v.store([n, (head - H - K) * E], stored)
    else:
        x = stored.to(tl.float32)
        g = tl.load(gain + head, mask=head < H, other=1.0)
        x *= (g * tl.rsqrt(tl.sum(x * x, axis=1) / E + EPS))[:, None]
        # Channels in groups of 2R, of which the first is turned: its halves, (rows, groups, R) each.
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, E // (2 * R), 2, R)), (0, 1, 3, 2)))
        turned = tl.arange(0, E // (2 * R))[None, :, None] == 0
        cosine, sine = tl.where(turned, c[:, None, :], 1.0), tl.where(turned, s[:, None, :], 0.0)
        pairs = tl.permute(tl.join(a * cosine + b * sine, b * cosine - a * sine), (0, 1, 3, 2))
        y = tl.reshape(pairs, (ROWS, E))
        if head < H:
            q.store([n, head * E], y)
        else:
            k.store([n, (head - H) * E], y)


@triton.jit
def _forward(
    a, w, factors, cos, sin, gain, x_out, q, k, v, n_tokens, length, D: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tiles of a (N, D) · w (S·E, D)ᵀ, a row of tiles after the other, by PROGRAMS programs in turn."""
    columns = (H + 2 * K) // 2
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, ROWS) * columns, PROGRAMS):
        n, head = tile // columns * ROWS, tile % columns * 2
        product = tl.zeros((ROWS, 2 * E), tl.float32)
        for d in range(0, D, DEPTH):
            product = tl.dot(a.load([n, d]), w.load([head * E, d]).T, product)
        row = n + tl.arange(0, ROWS)
        if factors is not None:
            product *= tl.load(factors + row, mask=row < n_tokens)[:, None]
        at = (row % length)[:, None] * R + tl.arange(0, R)
        c, s = tl.load(cos + at), tl.load(sin + at)
        first, second = halves(product, ROWS, E)
        _finish(first, c, s, gain, x_out, q, k, v, n, head, H, K, E, R, ROWS)
        _finish(second, c, s, gain, x_out, q, k, v, n, head + 1, H, K, E, R, ROWS)


@triton.jit
def _finish_given(
    x_in, cos, sin, gain, q, k, v, n_tokens, length,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put out K heads of BLOCK tokens: of the queries, the keys or the values."""
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None, None]
    part, head, e, has = tl.program_id(1), tl.arange(0, K)[:, None], tl.arange(0, E), n < n_tokens
    row = x_in + (n * (H + 2 * K) + part * K + head) * E
    x = read(row + e, has)
    if part * K == H + K:
        tl.store(v + (n * K + head) * E + e, x, mask=has)
    else:
        # As in _backward; the inverse rotation has the other sign.
        turned, angle = has & (e < 2 * R), (n % length) * R + e % R
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.where(e < R, 1, -1) * read(sin + angle, turned)
        g = tl.load(gain + part * K + head, mask=part * K + head < H, other=1.0)
        pair = read(row + tl.where(e < R, e + R, e - R), turned)
        y = (x * c + pair * s) * (g * tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / E + EPS))
        if part * K < H:
            tl.store(q + (n * H + part * K + head) * E + e, y, mask=has)
        else:
            tl.store(k + (n * K + head) * E + e, y, mask=has)


@triton.jit
def _backward(
    dq, dk, dv, x_in, cos, sin, gain, dx, dgain, n_tokens, length,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None, None]
    # K heads: of the queries, the keys or the values.
    part, k, e, has = tl.program_id(1), tl.arange(0, K)[:, None], tl.arange(0, E), n < n_tokens
    at = (n * (H + 2 * K) + part * K + k) * E + e
    if part * K == H + K:
        tl.store(dx + at, tl.load(dv + (n * K + k) * E + e, mask=has), mask=has)
    else:
        # Cosine and signed sine of a channel's rotation, and the channel it is paired with.
        turned, angle = has & (e < 2 * R), (n % length) * R + e % R
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.where(e < R, 1, -1) * read(sin + angle, turned)
        row = dk + (n * K + k) * E
        if part * K < H:
            row = dq + (n * H + part * K + k) * E
        t = read(row + e, has) * c
        t -= read(row + tl.where(e < R, e + R, e - R), turned) * s
        x = read(x_in + at, has)
        rstd = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / E + EPS)
        z = x * rstd
        along = tl.sum(t * z, axis=2, keep_dims=True)
        g = tl.load(gain + part * K + k, mask=part * K + k < H, other=1.0)
        tl.store(dx + at, g * rstd * (t - z * along / E), mask=has)
        if part * K < H:
            # One row a block, summed by the caller: the same in every run.
            partial = dgain + tl.program_id(0) * H + part * K + k
            tl.store(partial[None], tl.sum(along, axis=0, keep_dims=True))


def fits(heads: int, kv_heads: int, head_dim: int, pairs: int) -> bool:
    """Whether tiles come out even and fit: two query heads at a time; K, E and R powers of two; E from 16 to 64."""
    return heads % 2 == 0 and 16 <= head_dim <= 64 and powers_of_two(kv_heads, head_dim, pairs)


@torch.library.custom_op("fairway::heads", mutates_args=())
def heads(
    n: Tensor, factors: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, T, H, E), normed, rotated and gained, keys (B, T, K, E), normed and rotated, values, and x.

    n (B, T, D) and weight (S·E, D) contiguous, cos and sin (T, 1, R), gain (H,), where H may be 0. With factors
    (B, T, 1), float32, n's rows are multiplied by them, there is no gradient, and x, otherwise (B, T, S·E), is empty.
    """
    q, k, v, x = outputs = _empty(n, factors, weight, cos, sin, gain, kv_heads)
    (_, length, width), head_dim = n.shape, q.size(3)
    blocks = ((n, ROWS, DEPTH), (weight[None], 2 * head_dim, DEPTH), *((y, ROWS, head_dim) for y in (x, q, k, v)))
    a, w, x_tiles, q_tiles, *others = (
        TensorDescriptor.from_tensor(y.flatten(2).flatten(0, 1), [rows, columns]) if y.numel() else None
        for y, rows, columns in blocks
    )
    count = programs(n)
    sizes = (n.numel() // width, length, width, gain.numel(), kv_heads, head_dim, cos.size(-1), ROWS, DEPTH, count)
    # Where there are no queries, nothing is put out as such.
    tiles = (x_tiles, q_tiles or others[0], *others)
    _forward[(count,)](a, w, factors, cos, sin, gain, *tiles, *sizes, num_warps=4, num_stages=3)
    return outputs


@heads.register_fake
def _empty(n, factors, weight, cos, sin, gain, kv_heads):
    rows, length, _ = n.shape
    head_dim = weight.size(0) // (gain.numel() + 2 * kv_heads)
    q, k = (n.new_empty(rows, length, count, head_dim) for count in (gain.numel(), kv_heads))
    return q, k, torch.empty_like(k), n.new_empty((rows, length, weight.size(0)) if factors is None else 0)


@torch.library.custom_op("fairway::heads_backward", mutates_args=())
def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the gain, float32."""
    dx, lengths = torch.empty_like(x), (x.size(0) * x.size(1), x.size(1))
    (heads, width), kv_heads = dq.shape[2:], dk.size(2)
    grid = triton.cdiv(lengths[0], BLOCK), heads // kv_heads + 2
    dgain = gain.new_empty(grid[0], heads, dtype=torch.float32)
    sizes = (heads, kv_heads, width, cos.size(-1), BLOCK)
    gradients = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    _backward[grid](*gradients, x, cos, sin, gain, dx, dgain, *lengths, *sizes)
    return dx, dgain.sum(0)


@heads_backward.register_fake
def _(dq, dk, dv, x, cos, sin, gain):
    return torch.empty_like(x), torch.empty_like(gain, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[-1])


def _gradients(ctx, dq, dk, dv, _):
    n, _, weight, cos, sin, gain, x = ctx.saved_tensors
    dx, dgain = heads_backward(dq, dk, dv, x, cos, sin, gain)
    return dx @ weight, None, dx.flatten(0, 1).T @ n.flatten(0, 1), None, None, dgain.to(gain.dtype), None


heads.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("fairway::finished_heads", mutates_args=())
def finished_heads(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as of `heads`, from x (B, T, S·E), contiguous: products and what is added to them."""
    q, k, v = outputs = _empty_finished(x, cos, sin, gain, kv_heads)
    (n_tokens, length), heads = (x.size(0) * x.size(1), x.size(1)), gain.numel()
    grid = triton.cdiv(n_tokens, BLOCK), heads // kv_heads + 2
    sizes = (heads, kv_heads, k.size(3), cos.size(-1), BLOCK)
    _finish_given[grid](x, cos, sin, gain, q, k, v, n_tokens, length, *sizes)
    return outputs


@finished_heads.register_fake
def _empty_finished(x, cos, sin, gain, kv_heads):
    head_dim = x.size(2) // (gain.numel() + 2 * kv_heads)
    q, k = (x.new_empty(*x.shape[:2], count, head_dim) for count in (gain.numel(), kv_heads))
    return q, k, torch.empty_like(k)


def _save_finished(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _finished_gradients(ctx, dq, dk, dv):
    gain = ctx.saved_tensors[-1]
    dx, dgain = heads_backward(dq, dk, dv, *ctx.saved_tensors)
    return dx, None, None, dgain.to(gain.dtype), None


finished_heads.register_autograd(_finished_gradients, setup_context=_save_finished)
