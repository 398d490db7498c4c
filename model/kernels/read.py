# mypy: disallow-untyped-defs=False
"""How kernels read activations and small weights."""

import triton
import triton.language as tl


@triton.jit
def read(pointer, has):
    """In float32, and zero where there is nothing."""
    return tl.load(pointer, mask=has, other=0.0).to(tl.float32)
