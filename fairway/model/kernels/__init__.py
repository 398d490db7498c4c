"""Fused Triton kernels in bfloat16 on CUDA, for the work around the products of cuBLAS and the attention libraries.

Every kernel has a file with its maths and its backward pass, and is a torch.library operator, which the compiler takes
as a whole. Next to every call stands the same in plain PyTorch: it runs everywhere else, and the kernels are tested
against it. Triton is imported only where a kernel is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_watched = False


def fused(x: Tensor) -> bool:
    """Whether fused kernels are used on an activation such as `x`: bfloat16 on CUDA, and not in plain_products."""
    return x.is_cuda and x.dtype == torch.bfloat16 and not _watched


def powers_of_two(*sizes: int) -> bool:
    """Whether all sizes are powers of two, which most kernels need for their tiles and which the records' sizes are."""
    return all(size & (size - 1) == 0 for size in sizes)


def in_place(x: Tensor) -> bool:
    """Whether `x` (..., D) may be changed in place by fused kernels: no gradient needs it, and nothing is compiled.

    The compiler would replace changes in place by copies anyway; with those of a whole network it had once not finished
    after 100 s.
    """
    remembered = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return fused(x) and powers_of_two(x.size(-1)) and not remembered


@contextmanager
def plain_products() -> Iterator[None]:
    """No fused kernels inside: every weight is multiplied as it is and by itself, so that calibration can watch it."""
    global _watched
    _watched = True
    try:
        yield
    finally:
        _watched = False
