"""From the final hidden state to logits and the training loss.

Legend: B rows, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap(scores: Tensor, cap: float) -> Tensor:
    """cap·tanh(scores/cap), in float32 whatever comes in (logit soft-capping, Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(scores.float() / cap)


def mean_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of float32 logits in nats per token, a float32 scalar."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
