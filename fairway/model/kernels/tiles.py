# mypy: disallow-untyped-defs=False
"""What kernels have in common: reading numbers, halving a tile, and the number of programs that run side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Two programs share a multiprocessor, so that one multiplies while the other puts out its tile.
PER_PROCESSOR = 2


@triton.jit
def read(pointer, has):
    """The numbers at a pointer in float32, and zero where the mask `has` is false."""
    return tl.load(pointer, mask=has, other=0.0).to(tl.float32)


@triton.jit
def halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of a tile, (ROWS, HALF) each."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


def programs(x: Tensor) -> int:
    """How many programs take turns at the tiles of a product, on the device of `x`."""
    return PER_PROCESSOR * torch.cuda.get_device_properties(x.device).multi_processor_count
