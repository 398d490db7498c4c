"""Scales of rows, and rounding to nearest with them.

A scale is the step between two codes. It follows from the row's clip, the weight that becomes the largest code: a
percentile of the row's magnitudes, or a multiple of its standard deviation. Arithmetic is float32. Scales ship as
float16 and are rounded to it before codes are formed with them, except in plain_rows.

Legend: R rows, C columns, P candidate scales of a row, Q the largest code.

Source: PR #1150 and #1488 (percentiles, there called "GPTQ-lite"), PR #1493 and #1855 (multiples of sigma); quantize.md
2.1, 2.2 and 2.4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairway.codec.codes import Quantized, largest_code

# The smallest positive float16. No scale is smaller, so that a row of zeros has one that can be divided by.
SMALLEST_SCALE = 2.0**-24
# The smallest normal float16. Below it float16 keeps fewer than 11 significant bits of a scale.
SMALLEST_NORMAL_SCALE = 2.0**-14


def percentile_scales(weight: Tensor, percentiles: Sequence[float], *, bits: int, min_clip: float) -> Tensor:
    """Float32 scales (P, R) of a matrix (R, C): for each percentile (0 to 1), a row's clip is that quantile of |row|.

    A clip is at least `min_clip`. With the records' 1.0, rows of small weights are rounded to multiples of 1/Q whatever
    their own size. They then use fewer codes and take fewer bytes, and the size of the artifact depends on how large
    the weights are.
    """
    quantiles = torch.tensor(percentiles, dtype=torch.float32, device=weight.device)
    clip_PR = torch.quantile(weight.float().abs(), quantiles, dim=1)
    return (clip_PR.clamp(min=min_clip) / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def sigma_scales(weight: Tensor, sigmas: float, *, bits: int) -> Tensor:
    """Float32 scales (R,) of a matrix (R, C): a row's clip is `sigmas` of its standard deviations.

    From about 10 on no weight is clipped. The number then sets the bits per weight alone, since a step is sigmas/Q
    standard deviations. A row of a single weight has no standard deviation; its magnitude is taken instead.
    """
    weight = weight.float()
    deviation_R = weight.std(dim=1) if weight.size(1) > 1 else weight[:, 0].abs()
    return (sigmas * deviation_R / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def coarse_scales(scales: Tensor, mantissa_bits: int) -> Tensor:
    """Float32 scales of any shape, rounded to `mantissa_bits` bits behind the leading one; they compress better.

    With 3 bits no scale moves by more than 6.25 %. The codes are formed with the rounded scale afterwards, so that the
    rounding adds no error of its own.
    """
    mantissa, exponent = torch.frexp(scales)
    steps = 2.0 ** (mantissa_bits + 1)
    return torch.ldexp((mantissa * steps).round() / steps, exponent)


def nearest(weight: Tensor, step: Tensor, largest: int) -> Tensor:
    """Float32 codes, the multiples of `step` nearest to float32 weights: rounded half to even, clamped to ±largest.

    The steps, float32, have a shape that broadcasts to the one of the weights, which is that of the codes.
    """
    return (weight / step).round_().clamp_(-largest, largest)


def nearest_codes(weight: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """The nearest codes, int8 (R, C), of a float32 matrix (R, C) at float32 scales of rows (R,)."""
    return nearest(weight, scale[:, None], largest_code(bits)).to(torch.int8)


def best_of(weight: Tensor, candidates: Sequence[Quantized]) -> int:
    """The index of the candidate with the smallest squared error over the float32 matrix; of equals the first."""
    errors = [float((weight - candidate.dequantize()).square().mean()) for candidate in candidates]
    return errors.index(min(errors))


def searched_rows(weight: Tensor, scales: Tensor, *, bits: int) -> tuple[Quantized, int]:
    """A matrix (R, C) rounded at the best of the float32 candidate scales (P, R), and which of them that is."""
    weight = weight.float()
    candidates = [Quantized(nearest_codes(weight, scale.float(), bits=bits), scale, bits) for scale in scales.half()]
    best = best_of(weight, candidates)
    return candidates[best], best


def plain_rows(weight: Tensor, scale: Tensor, *, bits: int) -> Quantized:
    """A matrix (R, C) rounded at float32 scales (R,), as the records round embedding tables.

    As in the records the codes are formed with the float32 scale, though they are read back with its float16 rounding,
    which differs by at most 2^-11 of it. Scales so small that float16 rounds them more coarsely are rounded first.
    """
    rounded = scale.half()
    scale = torch.where(scale < SMALLEST_NORMAL_SCALE, rounded.float(), scale)
    return Quantized(nearest_codes(weight.float(), scale, bits=bits), rounded, bits)
