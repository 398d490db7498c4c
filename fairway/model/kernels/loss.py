# mypy: disallow-untyped-defs=False
"""Output head, softcap and mean cross-entropy as one operator that never stores float32 logits.

Legend: N tokens, D width, V vocabulary, c the softcap.

    forward     z = h·Wᵀ (bfloat16);  ℓ = c·tanh(z/c);  loss = mean_N(log Σ_V exp ℓ − ℓ[target])
                dz = (softmax(ℓ) − 1[target])·(1 − tanh²(z/c)) / N, written over z in the same pass
    backward    dh = dz·W·dloss;  dW = dzᵀ·h·dloss

The gradient of the scores costs nothing extra where they are read anyway. After the fused cross-entropy of PR #1855,
which recomputes it from z in a second pass. For softcaps up to LARGEST_CAP: e^(−2c) must be a float32 number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairway.model.kernels.tiles import read

LARGEST_CAP = 40.0


@triton.jit
def _loss(z, targets, losses, n_tokens, cap, V: tl.constexpr, V2: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, V2)
    target = tl.load(targets + row)
    hit = tl.load(z + row * V + target)
    # All threads wait here, because one reads the target's score and another overwrites it.
    tl.debug_barrier()
    tanh = _tanh(read(z + row * V + v, v < V) * (1 / cap))
    # Logits lie within ±cap, so subtracting cap does what subtracting the largest would.
    weights = tl.where(v < V, tl.exp(cap * tanh - cap), 0.0)
    total = tl.sum(weights)
    tl.store(losses + row, tl.log(total) + cap - cap * _tanh(hit * (1 / cap)))
    gradient = weights * (1 / total) - tl.where(v == target, 1.0, 0.0)
    tl.store(z + row * V + v, gradient * (1 - tanh * tanh) * (1 / n_tokens), mask=v < V)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@torch.library.custom_op("fairway::softcapped_loss", mutates_args=())
def softcapped_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Mean loss in nats (float32 scalar) of hidden (N, D) against targets (N,), and dz (N, V); weight (V, D)."""
    z = hidden @ weight.T
    n_tokens, vocabulary = z.shape
    losses = z.new_empty(n_tokens, dtype=torch.float32)
    width = triton.next_power_of_2(vocabulary)
    warps = min(16, max(1, width // 1024))
    _loss[(n_tokens,)](z, targets.contiguous(), losses, n_tokens, cap, vocabulary, width, num_warps=warps)
    return losses.mean(), z


@softcapped_loss.register_fake
def _(hidden, weight, targets, cap):
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(hidden.size(0), weight.size(0))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradients(ctx, dloss, _):
    hidden, weight, dz = ctx.saved_tensors
    return dloss * (dz @ weight), dloss * (dz.T @ hidden), None, None


softcapped_loss.register_autograd(_gradients, setup_context=_save)
