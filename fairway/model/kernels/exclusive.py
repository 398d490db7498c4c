# mypy: disallow-untyped-defs=False
"""Exclusive self-attention and the gate behind it (attention.py), one pass over the data each way.

Legend: N tokens, K key/value heads, G query heads of each, E width of a head; the last three are powers of two.

With a = v/‖v‖, c = o·a and γ a head's gate (1 where there is none):

    forward     y = γ·(o − c·a)
    backward    h = γ·dy;  do = h − (h·a)·a;  dγ = dy·(o − c·a)
                da = −Σ_G [(h·a)·o + c·h];  dv = (da − (da·a)·a) / ‖v‖
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairway.model.kernels.tiles import read

# As torch.nn.functional.normalize.
SHORTEST = tl.constexpr(1e-12)


@triton.jit
def _place(n_tokens, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Indices of heads (n, k, g, 1) and of values (n, k, 1, e), channels, and which tokens exist."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None, None, None]
    row, e = n * K + tl.arange(0, K)[:, None, None], tl.arange(0, E)
    return row * G + tl.arange(0, G)[:, None], row * E + e, e, n < n_tokens


@triton.jit
def _direction(v, at_v, has):
    x = read(v + at_v, has)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=3, keep_dims=True)), SHORTEST)
    return x * inverse, inverse


@triton.jit
def _forward(o, v, gate, y, n_tokens, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    head, at_v, e, has = _place(n_tokens, K, G, E, BLOCK)
    at = head * E + e
    a, _ = _direction(v, at_v, has)
    x = read(o + at, has)
    result = x - tl.sum(x * a, axis=3, keep_dims=True) * a
    if gate is not None:
        result *= read(gate + head, has)
    tl.store(y + at, result, mask=has)


@triton.jit
def _backward(
    dy, o, v, gate, do, dv, dgate, n_tokens, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):
    head, at_v, e, has = _place(n_tokens, K, G, E, BLOCK)
    at = head * E + e
    a, inverse = _direction(v, at_v, has)
    x = read(o + at, has)
    h = read(dy + at, has)
    c = tl.sum(x * a, axis=3, keep_dims=True)
    if gate is not None:
        opened = tl.sum(h * (x - c * a), axis=3, keep_dims=True)
        tl.store(dgate + head, opened, mask=has)
        h *= read(gate + head, has)
    along = tl.sum(h * a, axis=3, keep_dims=True)
    tl.store(do + at, h - along * a, mask=has)
    da = -tl.sum(along * x + c * h, axis=2, keep_dims=True)
    d = (da - tl.sum(da * a, axis=3, keep_dims=True) * a) * inverse
    tl.store(dv + at_v, d, mask=has)


def _sizes(o: Tensor, v: Tensor) -> dict[str, int]:
    return {"K": v.size(2), "G": o.size(2) // v.size(2), "E": v.size(3), "BLOCK": 4}


@torch.library.custom_op("fairway::exclusive", mutates_args=())
def exclusive(o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """o (B, T, H, E) without what points along its own v (B, T, K, E), times gate (B, T, H); all in one dtype."""
    y, sizes, n_tokens = torch.empty_like(o), _sizes(o, v), o.size(0) * o.size(1)
    _forward[(triton.cdiv(n_tokens, sizes["BLOCK"]),)](o, v, gate, y, n_tokens, **sizes)
    return y


exclusive.register_fake(lambda o, v, gate: torch.empty_like(o))


@torch.library.custom_op("fairway::exclusive_backward", mutates_args=())
def exclusive_backward(dy: Tensor, o: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, v and the gate (empty without one)."""
    do, dv, dgate = _gradients_like(o, v, gate)
    sizes, n_tokens = _sizes(o, v), o.size(0) * o.size(1)
    grid = (triton.cdiv(n_tokens, sizes["BLOCK"]),)
    _backward[grid](dy.contiguous(), o, v, gate, do, dv, dgate, n_tokens, **sizes)
    return do, dv, dgate


def _gradients_like(o: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(o), torch.empty_like(v), o.new_empty(0) if gate is None else torch.empty_like(gate)


exclusive_backward.register_fake(lambda dy, o, v, gate: _gradients_like(o, v, gate))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    o, v, gate = ctx.saved_tensors
    do, dv, dgate = exclusive_backward(dy, o, v, gate)
    return do, dv, None if gate is None else dgate


exclusive.register_autograd(_gradients, setup_context=_save)
