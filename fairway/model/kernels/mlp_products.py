# mypy: disallow-untyped-defs=False
"""The MLP with its activation computed where the matrix products put out their tiles.

Legend: N tokens, D width, F MLP width, φ(p) = p² for p > 0 and p²/4 below.

    forward     P = n·Upᵀ;  A = φ(P);  y = A·Downᵀ
    backward    dP = (dy·Down)⊙φ'(P);  dUp = dPᵀ·n;  dn = dP·Up;  dDown = dyᵀ·A

Two of the six products apply φ or φ' to what they put out, which saves a pass over (N, F) each. P and dy·Down are
rounded to bfloat16 first, as if they had been stored. The idea is that of the fused MLP of PR #1855 and its author's
earlier ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fairway.model.kernels.tiles import halves, programs

# A tile of the result and the depth of a step towards it.
ROWS, COLUMNS, DEPTH = 128, 128, 64


@triton.jit
def _activate(product, pre, out, n, f, BACKWARD: tl.constexpr):
    """Store a tile: forward φ(P), and P where it is asked for; backward, where P is read, the product times φ'(P)."""
    stored = product.to(out.dtype)
    if BACKWARD:
        p = pre.load([n, f])
        result = stored.to(tl.float32) * tl.where(p > 0, 2 * p, 0.5 * p)
    else:
        if pre is not None:
            pre.store([n, f], stored)
        p = stored.to(tl.float32)
        result = p * p * tl.where(p > 0, 1.0, 0.25)
    out.store([n, f], result)


@triton.jit
def _product(
    a, b, factors, pre, out, n_tokens, F, D: tl.constexpr, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tiles of a (N, D) · b (F, D)ᵀ, a row of tiles after the other, by PROGRAMS programs in turn."""
    columns = tl.cdiv(F, COLUMNS)
    # Flattened, so that the next tile's loads begin before this one is stored.
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, ROWS) * columns, PROGRAMS, flatten=True):
        n, f = tile // columns * ROWS, tile % columns * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, D, DEPTH):
            product = tl.dot(a.load([n, d]), b.load([f, d]).T, product)
        if factors is not None:
            row = n + tl.arange(0, ROWS)
            product *= tl.load(factors + row, mask=row < n_tokens)[:, None]
        left, right = halves(product, ROWS, COLUMNS // 2)
        _put_out(left, pre, out, n, f, BACKWARD, ROWS, COLUMNS)
        _put_out(right, pre, out, n, f + COLUMNS // 2, BACKWARD, ROWS, COLUMNS)


@triton.jit
def _put_out(half, pre, out, n, f, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store half a tile, in two pieces if P is stored too: small pieces take little shared memory, and overlap."""
    if pre is None:
        _activate(half, pre, out, n, f, BACKWARD)
    else:
        first, second = halves(half, ROWS, COLUMNS // 4)
        _activate(first, pre, out, n, f, BACKWARD)
        _activate(second, pre, out, n, f + COLUMNS // 4, BACKWARD)


def _launch(
    a: Tensor, b: Tensor, pre: Tensor | None, out: Tensor, *, factors: Tensor | None = None, backward: bool = False
) -> None:
    step, piece = [ROWS, DEPTH], [ROWS, COLUMNS // (2 if pre is None else 4)]
    blocks = ((a, step), (b, step), (pre, piece), (out, piece))
    a_tiles, b_tiles, *tiles = (None if x is None else TensorDescriptor.from_tensor(x, block) for x, block in blocks)
    count = programs(a)
    sizes = (*out.shape, a.size(1), backward, ROWS, COLUMNS, DEPTH, count)
    _product[(count,)](a_tiles, b_tiles, factors, *tiles, *sizes, num_warps=4, num_stages=3)


@torch.library.custom_op("fairway::mlp", mutates_args=())
def mlp(n: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., D), and P and A (N, F) for the backward pass, of n (..., D), Up (F, D) and Down (D, F); all bfloat16."""
    y, pre, out = _empty(n, up, down)
    _launch(n.flatten(0, -2), up, pre, out)
    # Not a view of the product: autograd would not let adapters add to that in place.
    torch.mm(out, down.T, out=y.flatten(0, -2))
    return y, pre, out


@mlp.register_fake
def _empty(n, up, down):
    pre, out = (_hidden(n.flatten(0, -2), up) for _ in range(2))
    return n.new_empty(n.shape), pre, out


@torch.library.custom_op("fairway::activated", mutates_args=())
def activated(n: Tensor, factors: Tensor | None, up: Tensor) -> Tensor:
    """A (N, F), without a gradient, of Up (F, D) and n (N, D), whose rows are multiplied by factors (N,) if given."""
    out = _hidden(n, up)
    _launch(n, up, None, out, factors=factors)
    return out


def _hidden(n: Tensor, up: Tensor) -> Tensor:
    return n.new_empty(n.size(0), up.size(0))


activated.register_fake(lambda n, factors, up: _hidden(n, up))


@torch.library.custom_op("fairway::mlp_backward", mutates_args=())
def mlp_backward(dy: Tensor, down: Tensor, pre: Tensor) -> Tensor:
    """dP (N, F)."""
    out = torch.empty_like(pre)
    _launch(dy.contiguous(), down.T.contiguous(), pre, out, backward=True)
    return out


mlp_backward.register_fake(lambda dy, down, pre: torch.empty_like(pre))


def _save(ctx, inputs, output):
    (n, up, down), (_, pre, out) = inputs, output
    # P and A are read by nobody else: no zeros are made as their gradients.
    ctx.set_materialize_grads(False)
    # Matrices that adapters stand beside need no gradient, and then nor is there a use for what it is made of.
    ctx.save_for_backward(n if up.requires_grad else None, up, down, pre, out if down.requires_grad else None)


def _gradients(ctx, dy, *_):
    n, up, down, pre, out = ctx.saved_tensors
    dy_ND = dy.flatten(0, -2)
    dpre = mlp_backward(dy_ND, down, pre)
    dup, ddown = None if n is None else dpre.T @ n.flatten(0, -2), None if out is None else dy_ND.T @ out
    return (dpre @ up).view_as(dy), dup, ddown


mlp.register_autograd(_gradients, setup_context=_save)
