"""GPTQ: round one column after another, and let the columns still to come make up for each one's error.

Legend, of the paper: N matrices of one shape, R rows, C columns, W (N, R, C) weights, H (N, C, C) Hessians XᵀX of their
inputs, U the upper Cholesky factor of H⁻¹ = UᵀU, q codes, Q the largest code.

Method: arXiv:2210.17323 (IST-DASLab gptq.py), columns by descending diagonal of H. Source: PR #1172, #1855.
Ours: matrices of one shape go through the loop together, and H is factorised in float64, which does not fail.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.codec.codes import Quantized, largest_code
from fairway.quantization.clip import best_of
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section


class GptqSettings(Section):
    """GPTQ, rounding that compensates, and the text its Hessians come from (quantization/calibrate.py)."""

    classes: list[Literal["attn", "mlp", "embed"]] = Field(min_length=1)
    damping: float = Field(gt=0)
    block_size: int = Field(gt=0)
    # "validation" is the very text that is scored: not a code length, and recorded as such.
    calibration: Literal["train", "validation", "text", "generated"]
    # Plain text, for "text" alone.
    path: str | None
    batches: int = Field(gt=0)
    batch_rows: int = Field(gt=0)

    @model_validator(mode="after")
    def _text(self) -> "GptqSettings":
        if (self.path is not None) != (self.calibration == "text"):
            raise ValueError("path is the text file of calibration: text, and null for every other calibration")
        return self


@dataclass(frozen=True)
class Factors:
    """What the column loop needs of H: U (N, C, C) float32 and the columns' order (N, C), both of permuted columns."""

    U: Tensor
    order: Tensor
    # Inputs that never fired, (N, C), by original column. Their weights do nothing and become zero.
    dead: Tensor


def factorize(H: Tensor, *, damping: float) -> Factors:
    """Factors of Hessians H (N, C, C), each damped by `damping` times the mean of its diagonal.

    Raises torch.linalg.LinAlgError when an H is not finite.
    """
    H = H.double()
    diagonal = H.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal = diagonal.masked_fill(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    H = H.diagonal_scatter(diagonal + damping * diagonal.mean(dim=1, keepdim=True), dim1=1, dim2=2)
    rows, columns = order[:, :, None], order[:, None, :]
    H = H.gather(1, rows.expand_as(H)).gather(2, columns.expand_as(H))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return Factors(torch.linalg.cholesky(inverse, upper=True).float(), order, dead)


def gptq_codes(W: Tensor, scale: Tensor, factors: Factors, *, bits: int, block_size: int) -> Tensor:
    """Codes int8 (N, R, C) of float32 weights (N, R, C) at fixed float32 row scales (N, R).

    Within a block of columns an error reaches the columns behind it at once, beyond the block when the block is done.
    """
    order = factors.order[:, None, :].expand_as(W)
    V = W.masked_fill(factors.dead[:, None, :], 0.0).gather(2, order)
    q = torch.empty_like(V)
    for a in range(0, V.size(2), block_size):
        block = slice(a, min(a + block_size, V.size(2)))
        q[:, :, block], error = _round_block(V[:, :, block], scale, factors.U[:, block, block], largest_code(bits))
        V[:, :, block.stop :] -= error @ factors.U[:, block, block.stop :]
    return q.gather(2, order.argsort(dim=2)).to(torch.int8)


def _round_block(X: Tensor, scale: Tensor, U: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors, each float32 (N, R, columns), of a block of columns; X is overwritten."""
    codes, errors = torch.empty_like(X), torch.empty_like(X)
    for j in range(X.size(2)):
        q = (X[:, :, j] / scale).round_().clamp_(-Q, Q)
        error = (X[:, :, j] - q * scale) / U[:, j, j, None]
        X[:, :, j:] -= error[:, :, None] * U[:, None, j, j:]
        codes[:, :, j], errors[:, :, j] = q, error
    return codes, errors


def gptq(
    W: Tensor, H: Tensor, scales: Tensor, *, bits: int, damping: float, block_size: int
) -> list[tuple[Quantized, int]]:
    """Each of N float32 matrices (N, R, C) at the best of its candidate row scales (N, P, R), and which it was.

    Every candidate gets a loop of its own; the plain squared error of the weights decides, as in PR #1172, although
    GPTQ lowers another one. H (N, C, C) on the device where the work is to be done; the result is on the CPU.
    Raises UserError when H cannot be factorised.
    """
    W, scales = W.to(H.device), scales.half().to(H.device)
    try:
        factors = factorize(H, damping=damping)
    except torch.linalg.LinAlgError:
        raise UserError(
            "params.yaml: quantize.gptq: a Hessian is not finite: the network overflows on the calibration text"
        ) from None
    tried: list[Tensor] = []
    for p in range(scales.size(1)):
        # Where the floor on the clip binds, candidates coincide.
        if p and torch.equal(scales[:, p], scales[:, p - 1]):
            tried.append(tried[-1])
            continue
        tried.append(gptq_codes(W, scales[:, p].float(), factors, bits=bits, block_size=block_size))
    found = []
    for n in range(len(W)):
        candidates = [Quantized(codes[n], scales[n, p], bits) for p, codes in enumerate(tried)]
        best = best_of(W[n], candidates)
        found.append((Quantized(candidates[best].codes.cpu(), candidates[best].scale.cpu(), bits), best))
    return found
