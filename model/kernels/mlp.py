# mypy: disallow-untyped-defs=False
"""The MLP with its activation computed where the matrix products put out their tiles.

Legend: N tokens, D width, F MLP width, φ(p) = p² for p > 0 and p²/4 below.

    forward     P = n·Upᵀ;  A = φ(P);  y = A·Downᵀ
    backward    dP = (dy·Down)⊙φ'(P);  dUp = dPᵀ·n;  dn = dP·Up;  dDown = dyᵀ·A

Two of the six products carry the activation: P is rounded to bfloat16 before φ, dy·Down before φ', as if they had been
stored; what is saved is one pass each over (N, F). After the fused MLP of PR #1855 (and its author's before).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64


@triton.jit
def _finish(total, pre, out, n, f, BACKWARD: tl.constexpr):
    stored = total.to(out.dtype)
    if BACKWARD:
        p = pre.load([n, f]).to(tl.float32)
        result = stored.to(tl.float32) * tl.where(p > 0, 2 * p, 0.5 * p)
    else:
        pre.store([n, f], stored)
        p = stored.to(tl.float32)
        result = p * p * tl.where(p > 0, 1.0, 0.25)
    out.store([n, f], result.to(out.dtype))


@triton.jit
def _product(
    a, b, pre, out, n_tokens, F, DEEP: tl.constexpr, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr, SPLIT: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of a (N, DEEP) · b (F, DEEP)ᵀ, forward with P and φ(P) as results, backward with P as input too."""
    columns = tl.cdiv(F, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, ROWS) * columns, PROGRAMS, flatten=FLATTEN):
        n, f = tile // columns * ROWS, tile % columns * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, DEEP, DEPTH):
            total = tl.dot(a.load([n, d]), b.load([f, d]).T, total)
        if SPLIT == 1:
            _finish(total, pre, out, n, f, BACKWARD)
        else:
            left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            _finish(left, pre, out, n, f, BACKWARD)
            _finish(right, pre, out, n, f + COLUMNS // 2, BACKWARD)


def launch(a, b, pre, out, backward, *, rows=ROWS, columns=COLUMNS, depth=DEPTH, stages=3, warps=8, per_sm=1, split=2, flatten=True, **options):
    n_tokens, deep = a.shape
    d = lambda x, r, c: TensorDescriptor.from_tensor(x, [r, c])
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count * per_sm if a.is_cuda else 3
    _product[(programs,)](d(a, rows, depth), d(b, columns, depth), d(pre, rows, columns // split), d(out, rows, columns // split), n_tokens, b.size(0),
        deep, backward, rows, columns, depth, programs, split, flatten, num_warps=warps, num_stages=stages, **options)
