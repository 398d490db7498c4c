"""Fused Triton kernels in bfloat16 on CUDA: what cuBLAS and the attention libraries leave over.

One file a kernel, each with its maths and its own backward pass, each a torch.library operator, so that the compiler
takes it as a whole. The plain PyTorch form next to every call is what they are tested against, and what runs anywhere
else. Triton is imported only where a kernel is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_watched = False


def fused(x: Tensor) -> bool:
    """Whether fused kernels take over for an activation like `x`: bfloat16 on CUDA, unless products are watched."""
    return x.is_cuda and x.dtype == torch.bfloat16 and not _watched


def powers_of_two(*sizes: int) -> bool:
    """Whether they all are, as the records' are and tiles of most kernels ask."""
    return all(size & (size - 1) == 0 for size in sizes)


def in_place(x: Tensor) -> bool:
    """Whether, beyond that, nothing remembers `x` (..., D): no gradient is recorded, and the compiler does not watch.

    (A compiler undoes changes in place. Over those of a whole network it was once not done after 100 s.)
    """
    remembered = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return fused(x) and powers_of_two(x.size(-1)) and not remembered


@contextmanager
def plain_products() -> Iterator[None]:
    """Every weight multiplied by itself and as it is, for calibration to watch: no fused kernels."""
    global _watched
    _watched = True
    try:
        yield
    finally:
        _watched = False
