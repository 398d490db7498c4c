"""GPTQ: round one column after another, and change the columns still to come so that they make up for each error.

Rounding to nearest keeps the weights close to what they were. GPTQ keeps the products of the weights with their inputs
close, and knows the inputs by their Hessian.

Legend (letters of the paper): N matrices of one shape, R rows, C columns, P candidate scales of a row, W (N, R, C)
weights, H (N, C, C) Hessians XᵀX of their inputs, U the upper Cholesky factor of H⁻¹ = UᵀU, q codes, Q the largest
code.

Method: arXiv:2210.17323 (IST-DASLab gptq.py), columns in the order of a falling diagonal of H (quantize.md 2.3).
Source: PR #1172, #1855. Ours: matrices of one shape go through the loop together, H is factorised in float64, in which
the factorisation of a damped H does not fail, and a column may be rounded along a trellis (codec/trellis.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.codec.codes import Quantized, largest_code
from fairway.quantization.clip import SMALLEST_SCALE, best_of, nearest
from fairway.quantization.trellis_search import trellis_codes
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section


class GptqSettings(Section):
    """Which classes of tensors GPTQ rounds and how, and the text that its Hessians come from (calibrate.py)."""

    classes: list[Literal["attn", "mlp", "embed"]] = Field(min_length=1)
    damping: float = Field(gt=0)
    block_size: int = Field(gt=0)
    # "validation" is the very text that is scored. The score is then no code length; quantize.json records it.
    calibration: Literal["train", "validation", "text", "generated"]
    # The file of plain text for calibration "text", null otherwise.
    path: str | None
    batches: int = Field(gt=0)
    batch_rows: int = Field(gt=0)

    @model_validator(mode="after")
    def _text(self) -> "GptqSettings":
        if (self.path is not None) != (self.calibration == "text"):
            raise ValueError("path is the text file of calibration: text, and null for every other calibration")
        return self


# The codes (N, R), float32, of a column, from its weights, its steps, both (N, R), and the largest code.
Round = Callable[[Tensor, Tensor, int], Tensor]


# The values of quantize.grid in params.yaml. Each stands for a number of extra bits and for the function that rounds a
# column. With b extra bits the step between two codes is 2^b times smaller, and the largest code 2^b times larger.
# This is a table because of the program that ships: packing leaves out every entry but the one that the record uses.
GRIDS: dict[str, tuple[int, Round]] = {"scalar": (0, nearest), "trellis": (1, trellis_codes)}


def gptq(
    W: Tensor, H: Tensor, scales: Tensor, *, bits: int, damping: float, block_size: int, grid: str
) -> list[tuple[Quantized, int]]:
    """Each of N float32 matrices (N, R, C) rounded at the best of its candidate scales (N, P, R), and which that is.

    `grid` is a key of GRIDS. The codes of a finer grid have its extra bits, and their scales are as much smaller. Every
    candidate goes through the loop over columns. The best one has the smallest squared error of the weights, as
    in PR #1172, although that is not the error that GPTQ lowers. H (N, C, C) lies on the device where the work is to be
    done; the results are on the CPU. Raises UserError if an H is not finite.
    """
    extra_bits, rounded = GRIDS[grid]
    W, largest = W.to(H.device), largest_code(bits) << extra_bits
    scales = (scales.half() / 2**extra_bits).clamp(min=SMALLEST_SCALE).to(H.device)
    bits += extra_bits
    try:
        factors = factorize(H, damping=damping)
    except torch.linalg.LinAlgError:
        raise UserError(
            "params.yaml: quantize.gptq: a Hessian is not finite: the network overflows on the calibration text"
        ) from None
    tried: list[Tensor] = []
    for p in range(scales.size(1)):
        # Candidates are equal where min_clip is above the clips of both.
        if p and torch.equal(scales[:, p], scales[:, p - 1]):
            tried.append(tried[-1])
            continue
        steps = scales[:, p].float()
        tried.append(gptq_codes(W, steps, factors, largest=largest, block_size=block_size, rounded=rounded))
    found = []
    for n in range(len(W)):
        candidates = [Quantized(codes[n], scales[n, p], bits) for p, codes in enumerate(tried)]
        best = best_of(W[n], candidates)
        found.append((Quantized(candidates[best].codes.cpu(), candidates[best].scale.cpu(), bits), best))
    return found


@dataclass(frozen=True)
class Factors:
    """What the loop over columns needs of H."""

    # Float32 (N, C, C), with rows and columns of H in the order below.
    U: Tensor
    # The columns in the order in which they are rounded, int64 (N, C).
    order: Tensor
    # Whether an input was zero on the whole calibration text, bool (N, C). Weights on it do nothing and become zero.
    dead: Tensor


def factorize(H: Tensor, *, damping: float) -> Factors:
    """The factors of Hessians H (N, C, C), after `damping` times the mean of its diagonal is added to each diagonal.

    Raises torch.linalg.LinAlgError if an H is not finite.
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


def gptq_codes(
    W: Tensor, scale: Tensor, factors: Factors, *, largest: int, block_size: int, rounded: Round = nearest
) -> Tensor:
    """Codes int8 (N, R, C), within ±largest, of float32 weights (N, R, C) at given float32 scales of rows (N, R).

    The columns of a block take up each error at once. The columns behind the block take up all of its errors together
    when it is done, in one matrix product, which is what makes blocks fast.
    """
    order = factors.order[:, None, :].expand_as(W)
    V = W.masked_fill(factors.dead[:, None, :], 0.0).gather(2, order)
    q = torch.empty_like(V)
    for a in range(0, V.size(2), block_size):
        block = slice(a, min(a + block_size, V.size(2)))
        U = factors.U[:, block, block]
        q[:, :, block], error = _round_block(V[:, :, block], U, lambda column: rounded(column, scale, largest), scale)
        V[:, :, block.stop :] -= error @ factors.U[:, block, block.stop :]
    return q.gather(2, order.argsort(dim=2)).to(torch.int8)


def _round_block(X: Tensor, U: Tensor, rounded: Callable[[Tensor], Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round a block of columns X (N, R, c); its codes and its errors divided by U's diagonal, both float32 (N, R, c).

    X is overwritten.
    """
    codes, errors = torch.empty_like(X), torch.empty_like(X)
    for j in range(X.size(2)):
        q = rounded(X[:, :, j])
        error = (X[:, :, j] - q * scale) / U[:, j, j, None]
        X[:, :, j:] -= error[:, :, None] * U[:, None, j, j:]
        codes[:, :, j], errors[:, :, j] = q, error
    return codes, errors
