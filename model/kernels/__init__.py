"""Fused Triton kernels for training in bfloat16 on CUDA: what cuBLAS and the attention libraries leave over.

One file a kernel, each with its maths and its own backward pass, each a torch.library operator, so that the compiler
takes it as a whole. The plain PyTorch form next to every call is what they are tested against, and what runs anywhere
else. Triton is imported only where a kernel is used.
"""

import torch
from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether fused kernels take over for an activation like `x`: bfloat16 on CUDA, while gradients are recorded.

    Without gradients the compiler's own fusion is as good, and calibration watches the plain products.
    """
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled()
