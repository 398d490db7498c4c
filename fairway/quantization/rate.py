"""Rate control: the steps between codes at which model.bin becomes as large as it may be.

Wider steps give fewer different codes and so fewer bytes. Quantizing and packing once takes long, so the next factor is
predicted: a row of Gaussian weights whose step is 1/x of its standard deviation takes ½·log2(2πe(x² + 1/12)) bits a
weight. Real rows and real coders deviate from that, but by nearly the same amount at a slightly wider step. The formula
is therefore used only for the difference from a size that was measured.

Legend: R rows of all matrices together.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fairway.codec.codes import Quantized, QuantizedState
from fairway.quantization.quantize_weights import QuantizeSettings, quantize_state
from fairway.runtime.errors import UserError

# The search ends with a size that is below the target by at most this share of it.
TOLERANCE = 1e-3
# How often the weights are quantized and packed at most.
MAX_ROUNDS = 16
# The search also ends when the smallest factor that fits is less than this times the largest that does not. Sizes that
# near should differ by less than TOLERANCE, but scales of few bits may all jump at once.
NEAREST = 1.001
# The largest factor that is tried. With it every weight is rounded to zero.
COARSEST = 100.0


def quantize_to_size(
    weights: dict[str, Tensor],
    settings: QuantizeSettings,
    hessians: dict[str, Tensor],
    packed_bytes: Callable[[QuantizedState], int],
) -> tuple[QuantizedState, dict[str, int], float]:
    """As quantize_state, with all steps widened by the factor that brings `packed_bytes` just below target_bytes.

    Steps are never narrowed: codes that fit as they are stay as they are, and so do all codes if target_bytes is null.
    Where the size jumps across the target as the factor grows, the largest size found below it is taken. Returns what
    quantize_state does, and the factor. Raises UserError if no factor fits.
    """
    coarseness, target = 1.0, settings.target_bytes
    too_fine, too_coarse = 1.0, math.inf
    fitting: tuple[QuantizedState, dict[str, int], float] | None = None
    for attempt in range(MAX_ROUNDS):
        state, chosen = quantize_state(weights, settings, hessians=hessians, coarseness=coarseness)
        if target is None:
            return state, chosen, coarseness
        size = packed_bytes(state)
        if (1 - TOLERANCE) * target <= size <= target or (coarseness == 1 and size < target):
            return state, chosen, coarseness
        _require_matrices(state, settings, size)
        if size > target:
            too_fine = coarseness
        else:
            too_coarse, fitting = coarseness, (state, chosen, coarseness)
        if too_coarse < NEAREST * too_fine:
            break
        coarseness *= wider_by(state, round((1 - TOLERANCE / 2) * target) - size)
        # The formula fails where codes take less than about a bit and a half per weight. If it still has not succeeded,
        # or leads out of the interval that is left, take the interval's geometric middle. Until a factor fits, the
        # interval is taken to end at four times its beginning.
        if attempt > 4 or not too_fine < coarseness < too_coarse:
            coarseness = math.sqrt(too_fine * min(too_coarse, 4 * too_fine))
        if too_fine >= COARSEST:
            break
        coarseness = min(coarseness, COARSEST)
    if fitting:
        return fitting
    raise UserError(f"params.yaml: quantize.target_bytes: {target} bytes cannot be met, the last try took {size}")


def _require_matrices(state: QuantizedState, settings: QuantizeSettings, size: int) -> None:
    """Raise UserError if no tensor was rounded, so that no factor can change the size."""
    if not any(isinstance(value, Quantized) for value in state.values()):
        raise UserError(
            f"params.yaml: quantize.target_bytes: {settings.target_bytes} bytes cannot be met: as all matrices have at "
            f"most passthrough_elements ({settings.passthrough_elements}), they stay float16 and take {size}"
        )


def wider_by(state: QuantizedState, more_bytes: int) -> float:
    """The factor on all steps at which the codes should take `more_bytes` more, or fewer where that is negative.

    It is found by halving the interval from 1/16 to 16.
    """
    matrices = [value for value in state.values() if isinstance(value, Quantized)]
    columns_R = torch.cat([torch.full((len(matrix.codes),), matrix.codes.size(1)) for matrix in matrices]).double()
    square_R = torch.cat([matrix.codes.double().square().mean(dim=1) for matrix in matrices])
    # (sigma / step)² of each row. A row's mean squared code is that and 1/12, the share that rounding adds.
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
