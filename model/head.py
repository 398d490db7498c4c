"""From the final hidden state to logits and the training loss.

Legend: B rows, T tokens, N = B·T, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import fused
from model.precision import linear


def softcap(scores: Tensor, cap: float) -> Tensor:
    """cap·tanh(scores/cap), in float32 whatever comes in (logit soft-capping, Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(scores.float() / cap)


def logits(hid: Tensor, table_VD: Tensor, *, cap: float) -> Tensor:
    """Softcapped logits (..., V), float32, from the final hidden state (..., D); the product runs in its dtype."""
    return softcap(linear(hid, table_VD), cap)


def mean_cross_entropy(hid_BTD: Tensor, table_VD: Tensor, targets_BT: Tensor, *, cap: float) -> Tensor:
    """Mean cross-entropy of the softcapped logits in nats per token, a float32 scalar."""
    hid_ND, targets_N = hid_BTD.flatten(0, 1), targets_BT.flatten()
    if fused(hid_BTD):
        from model.kernels.loss import LARGEST_CAP, softcapped_loss

        if cap <= LARGEST_CAP:
            return softcapped_loss(hid_ND, table_VD.to(hid_ND.dtype), targets_N, cap)[0]
    return F.cross_entropy(logits(hid_ND, table_VD, cap=cap), targets_N)
