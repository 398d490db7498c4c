# mypy: disallow-untyped-defs=False
"""Sources of the residual stream joined and normed, one pass over the data each way.

Legend: N tokens, D width, a power of two, J sources (2 or 3), x_j the sources, c_j their weights per channel.

With r = 1/√(mean(u²) + ε) per token and s the constant scale of the norm:

    forward     u = Σ_j c_j⊙x_j;  n = s·r·u, or the factors s·r alone, for a product to multiply its rows by
    backward    g = du + s·r·(dn − u·r²·mean(dn⊙u));  dx_j = c_j⊙g;  dc_j = Σ_N g⊙x_j

Without weights (all 1) the gradient g is the same for all sources and written once. Where the weights need no gradient,
as in a network that only carries adapters, u is kept instead of the sources, and dx_j is written where it is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairway.model.kernels.tiles import read

EPS = tl.constexpr(2.0**-23)
# Tokens of a tile. For the gradient of the mix a tile has LARGE_TILE numbers, and PROGRAMS programs take tiles in turn,
# so that each sums dc over many tokens in registers.
BLOCK, LARGE_TILE, PROGRAMS = 4, 4096, 264


@triton.jit
def _tile(tile, n_tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    n = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    return n * D + tl.arange(0, D), n < n_tokens


@triton.jit
def _weights(c, j, D: tl.constexpr):
    return tl.load(c + j * D + tl.arange(0, D))


@triton.jit
def _forward(x0, x1, x2, c, rows, u, n, n_tokens, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """Where only the factors are wanted, `n` is their float32 tensor, and otherwise of the sources' dtype."""
    at, has = _tile(tl.program_id(0), n_tokens, D, BLOCK)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    s0 = read(x0 + at, has)
    total = s0
    if x1 is not None:
        last = at
        if rows is not None:
            last = tl.load(rows + token, mask=has, other=0) * D + tl.arange(0, D)
        if c is None:
            total = s0 + read(x1 + last, has)
        elif x2 is None:
            total = _weights(c, 0, D) * s0 + _weights(c, 1, D) * read(x1 + last, has)
        else:
            total = _weights(c, 0, D) * s0 + _weights(c, 1, D) * read(x1 + at, has)
            total += _weights(c, 2, D) * read(x2 + last, has)
    stored = total.to(x0.dtype.element_ty)
    if u is not None:
        tl.store(u + at, stored, mask=has)
    # The norm sees the stream as it is stored.
    total = stored.to(tl.float32)
    factor = scale * tl.rsqrt(tl.sum(total * total, axis=1, keep_dims=True) / D + EPS)
    if n.dtype.element_ty == tl.float32:
        tl.store(n + token, factor, mask=has)
    else:
        tl.store(n + at, factor * total, mask=has)


@triton.jit
def _norm_gradient(du, dn, total, scale, D: tl.constexpr):
    r = tl.rsqrt(tl.sum(total * total, axis=1, keep_dims=True) / D + EPS)
    return du + scale * r * (dn - total * (r * r * tl.sum(dn * total, axis=1, keep_dims=True) / D))


@triton.jit
def _backward_sources(du, dn, u, c, d0, d1, d2, n_tokens, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the sources that have a tensor for it; without weights d0 is that of them all.

    Where only u or only n is used, the other's gradient is not there.
    """
    at, has = _tile(tl.program_id(0), n_tokens, D, BLOCK)
    g = tl.zeros((BLOCK, D), tl.float32)
    if du is not None:
        g = read(du + at, has)
    if dn is not None:
        total = read(u + at, has)
        of_n = read(dn + at, has)
        g = _norm_gradient(g, of_n, total, scale, D)
    if c is None:
        tl.store(d0 + at, g, mask=has)
    else:
        if d0 is not None:
            tl.store(d0 + at, _weights(c, 0, D) * g, mask=has)
        if d1 is not None:
            tl.store(d1 + at, _weights(c, 1, D) * g, mask=has)
        if d2 is not None:
            tl.store(d2 + at, _weights(c, 2, D) * g, mask=has)


@triton.jit
def _backward_mix(
    du, dn, x0, x1, x2, c, d0, d1, d2, dc, n_tokens, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    w0, w1 = _weights(c, 0, D), _weights(c, 1, D)
    sum0 = tl.zeros((BLOCK, D), tl.float32)
    sum1 = tl.zeros((BLOCK, D), tl.float32)
    if x2 is not None:
        w2, sum2 = _weights(c, 2, D), tl.zeros((BLOCK, D), tl.float32)
    # The next tiles are under way while one is worked on.
    for tile in tl.range(program, tl.cdiv(n_tokens, BLOCK), PROGRAMS, num_stages=3):
        at, has = _tile(tile, n_tokens, D, BLOCK)
        s0 = read(x0 + at, has)
        s1 = read(x1 + at, has)
        of_u = read(du + at, has)
        of_n = read(dn + at, has)
        total = w0 * s0 + w1 * s1
        if x2 is not None:
            s2 = read(x2 + at, has)
            total += w2 * s2
        # The stream as it was stored, recomputed: cheaper than reading it.
        total = total.to(x0.dtype.element_ty).to(tl.float32)
        g = _norm_gradient(of_u, of_n, total, scale, D)
        tl.store(d0 + at, w0 * g, mask=has)
        tl.store(d1 + at, w1 * g, mask=has)
        sum0 += g * s0
        sum1 += g * s1
        if x2 is not None:
            tl.store(d2 + at, w2 * g, mask=has)
            sum2 += g * s2
    d = tl.arange(0, D)
    # One row a program, summed by the caller: the same in every run.
    row = dc + program * (2 if x2 is None else 3) * D + d
    tl.store(row, tl.sum(sum0, axis=0))
    tl.store(row + D, tl.sum(sum1, axis=0))
    if x2 is not None:
        tl.store(row + 2 * D, tl.sum(sum2, axis=0))


def _per_token(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    width = x.size(-1)
    return x.numel() // width, {"D": width, "BLOCK": BLOCK}


def factors(x: Tensor, scale: float) -> Tensor:
    """s·r of every token of x (B, T, D), contiguous: (B, T, 1) float32. It has no gradient and cannot be compiled."""
    f, (n_tokens, sizes) = _per_token(x), _sizes(x)
    _forward[(triton.cdiv(n_tokens, BLOCK),)](x, None, None, None, None, None, f, n_tokens, scale, **sizes)
    return f


@torch.library.custom_op("fairway::mix_norm", mutates_args=())
def mix_norm(
    x0: Tensor, x1: Tensor, x2: Tensor | None, c: Tensor | None, rows: Tensor | None, scale: float, aside: bool
) -> tuple[Tensor, Tensor]:
    """u = Σ c[j]⊙x_j and n = scale·norm(u), all (B, T, D), contiguous; c (J, D), or all 1 for two sources.

    With `aside` the factors s·r of u's tokens, (B, T, 1) float32, are returned instead of n. With `rows` (B, T) the
    last source is a table (U, D), and they say which row of it stands at each place. Neither has a gradient.
    """
    u, n = _mixed(x0, x1, x2, c, rows, scale, aside)
    n_tokens, sizes = _sizes(x0)
    _forward[(triton.cdiv(n_tokens, BLOCK),)](x0, x1, x2, c, rows, u, n, n_tokens, scale, **sizes)
    return u, n


@mix_norm.register_fake
def _mixed(x0, x1, x2, c, rows, scale, aside):
    return torch.empty_like(x0), _per_token(x0) if aside else torch.empty_like(x0)


@torch.library.custom_op("fairway::mix_norm_backward", mutates_args=())
def mix_norm_backward(
    du: Tensor, dn: Tensor, x0: Tensor, x1: Tensor, x2: Tensor | None, c: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sources, empty for what is absent, and of c, float32."""
    d0, d1, d2, dc = _gradients_like(du, dn, x0, x1, x2, c, scale)
    (n_tokens, sizes), du, dn = _sizes(x0), du.contiguous(), dn.contiguous()
    partial = c.new_empty(PROGRAMS, *c.shape, dtype=torch.float32)
    arguments = (du, dn, x0, x1, x2, c, d0, d1, d2, partial, n_tokens, scale)
    sizes["BLOCK"] = LARGE_TILE // x0.size(-1) or 1
    _backward_mix[(PROGRAMS,)](*arguments, **sizes, PROGRAMS=PROGRAMS, num_warps=8)
    return d0, d1, d2, torch.sum(partial, 0, out=dc)


@mix_norm_backward.register_fake
def _gradients_like(du, dn, x0, x1, x2, c, scale):
    d0, d1, d2 = (x0.new_empty(0) if x is None else torch.empty_like(x) for x in (x0, x1, x2))
    return d0, d1, d2, x0.new_empty(c.shape, dtype=torch.float32)


@torch.library.custom_op("fairway::mix_norm_backward_sources", mutates_args=())
def mix_norm_backward_sources(
    du: Tensor | None, dn: Tensor | None, u: Tensor, c: Tensor | None, needed: list[bool], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sources alone, empty for one that is not needed; without c that of any source is the first."""
    gradients = _sources_like(du, dn, u, c, needed, scale)
    n_tokens, sizes = _sizes(u)
    written = [gradient if gradient.numel() else None for gradient in gradients]
    given = [None if gradient is None else gradient.contiguous() for gradient in (du, dn)]
    _backward_sources[(triton.cdiv(n_tokens, BLOCK),)](*given, u, c, *written, n_tokens, scale, **sizes)
    return gradients


@mix_norm_backward_sources.register_fake
def _sources_like(du, dn, u, c, needed, scale):
    d0, d1, d2 = (torch.empty_like(u) if one else u.new_empty(0) for one in needed)
    return d0, d1, d2


def _save(ctx, inputs, output):
    *sources, c, _, ctx.scale, _ = inputs
    ctx.fixed = c is None or not c.requires_grad
    # No zeros are made as the gradient of what is not used.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((output[0], None, None) if ctx.fixed else sources), c)


def _gradients(ctx, du, dn):
    x0, x1, x2, c = ctx.saved_tensors
    if not ctx.fixed:
        du, dn = (torch.zeros_like(x0) if gradient is None else gradient for gradient in (du, dn))
        d0, d1, d2, dc = mix_norm_backward(du, dn, x0, x1, x2, c, ctx.scale)
        return d0, d1, None if x2 is None else d2, dc.to(c.dtype), None, None, None
    needed = [True, False, False] if c is None else list(ctx.needs_input_grad[:3])
    gradients = mix_norm_backward_sources(du, dn, x0, c, needed, ctx.scale)
    if c is None:
        return gradients[0], gradients[0], None, None, None, None, None
    return *(d if one else None for d, one in zip(gradients, needed, strict=True)), None, None, None, None


mix_norm.register_autograd(_gradients, setup_context=_save)
