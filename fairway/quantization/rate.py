"""The steps that make model.bin as large as it may be.

A row of Gaussian weights at a step of 1/x standard deviations costs ½·log2(2πe(x² + 1/12)) bits a weight. Real rows and
coders are a little off, but they are off by the same at a slightly wider step: so the formula only ever predicts the
difference to a size that was measured.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairway.codec.codes import Quantized, QuantizedState
from fairway.quantization.quantize_weights import QuantizeSettings, quantize_state
from fairway.runtime.errors import UserError

# A size within this share below the target is near enough.
TOLERANCE = 1e-3
MAX_ROUNDS = 16
# Steps nearer than this should give sizes nearer than TOLERANCE; but scales of few bits may all move at once.
NEAREST = 1.001
# By then every weight is rounded to zero.
COARSEST = 100.0


def quantize_to_size(
    weights: dict[str, Tensor],
    settings: QuantizeSettings,
    hessians: dict[str, Tensor],
    packed_bytes: Callable[[QuantizedState], int],
) -> tuple[QuantizedState, dict[str, Any]]:
    """quantize_state, all steps widened by the factor that brings `packed_bytes` just below settings.target_bytes.

    Steps are not narrowed: codes that fit the target as they are stay so, as they do without a target. Where the size
    jumps over the target, the largest below it is taken. Returns the codes and a report: the calibration text,
    coarseness (the factor), and figures by tensor. Raises UserError when no factor is found.
    """
    calibration = settings.gptq.calibration if settings.gptq else None
    coarseness, target = 1.0, settings.target_bytes
    too_fine, too_coarse = 1.0, math.inf
    fitting: tuple[QuantizedState, dict[str, Any]] | None = None
    for attempt in range(MAX_ROUNDS):
        state, tensors = quantize_state(weights, settings, hessians=hessians, coarseness=coarseness)
        report = {"calibration": calibration, "coarseness": coarseness, "tensors": tensors}
        if target is None:
            return state, report
        size = packed_bytes(state)
        if (1 - TOLERANCE) * target <= size <= target or (coarseness == 1 and size < target):
            return state, report
        _require_matrices(state, settings, size)
        if size > target:
            too_fine = coarseness
        else:
            too_coarse, fitting = coarseness, (state, report)
        if too_coarse < NEAREST * too_fine:
            break
        coarseness *= wider_by(state, round((1 - TOLERANCE / 2) * target) - size)
        # Below a bit and a half per weight the formula errs; halving the interval does not.
        if attempt > 4 or not too_fine < coarseness < too_coarse:
            coarseness = math.sqrt(too_fine * min(too_coarse, 4 * too_fine))
        if too_fine >= COARSEST:
            break
        coarseness = min(coarseness, COARSEST)
    if fitting:
        return fitting
    raise UserError(f"params.yaml: quantize.target_bytes: {target} bytes cannot be met, the last try took {size}")


def _require_matrices(state: QuantizedState, settings: QuantizeSettings, size: int) -> None:
    if not any(isinstance(value, Quantized) for value in state.values()):
        raise UserError(
            f"params.yaml: quantize.target_bytes: {settings.target_bytes} bytes cannot be met: as all matrices have at "
            f"most passthrough_elements ({settings.passthrough_elements}), they stay float16 and take {size}"
        )


def wider_by(state: QuantizedState, more_bytes: int) -> float:
    """The factor on all steps at which the codes are predicted to take so many more bytes (negative: fewer)."""
    matrices = [value for value in state.values() if isinstance(value, Quantized)]
    columns_R = torch.cat([torch.full((len(matrix.codes),), matrix.codes.size(1)) for matrix in matrices]).double()
    square_R = torch.cat([matrix.codes.double().square().mean(dim=1) for matrix in matrices])
    # What is left of a code's mean square once rounding's share is taken off: (sigma / step)².
    ratio_R = (square_R - 1 / 12).clamp(min=0.0)

    def code_bytes(factor: float) -> float:
        bits_R = (2 * math.pi * math.e * (ratio_R / factor**2 + 1 / 12)).log2() / 2
        return float((columns_R * bits_R).sum()) / 8

    wanted = code_bytes(1.0) + more_bytes
    narrow, wide = 1 / 16, 16.0
    while wide / narrow > 1 + 1e-6:
        middle = math.sqrt(narrow * wide)
        narrow, wide = (middle, wide) if code_bytes(middle) > wanted else (narrow, middle)
    return wide
