"""Row scales, and rounding to nearest with them.

R rows, C columns, P candidates, Q the largest code. Arithmetic is float32; a scale is rounded to float16 because that
is what ships. Source: PR #1150 and #1488 (percentiles; "GPTQ-lite"), #1493 and #1855 (multiples of sigma).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairway.codec.codes import Quantized, largest_code

# The smallest positive float16. A row of zeros, or of weights far below it, keeps a scale that can be divided by.
SMALLEST_SCALE = 2.0**-24
# Below this float16 keeps fewer than 11 bits of a scale.
SMALLEST_NORMAL_SCALE = 2.0**-14


def percentile_scales(weight: Tensor, percentiles: Sequence[float], *, bits: int, min_clip: float) -> Tensor:
    """Float32 scales (P, R): for each quantile of |row|, the step at which that value becomes the largest code.

    No row is scaled as if its clip were below `min_clip`. The records' 1.0 puts rows of small weights on the fixed grid
    Z/Q: fewer codes in use, so fewer bytes, and an artifact whose size follows the weights' magnitude.
    """
    quantiles = torch.tensor(percentiles, dtype=torch.float32, device=weight.device)
    clip_PR = torch.quantile(weight.float().abs(), quantiles, dim=1)
    return (clip_PR.clamp(min=min_clip) / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def sigma_scales(weight: Tensor, sigmas: float, *, bits: int) -> Tensor:
    """Float32 scales (R,): `sigmas` standard deviations of the row become the largest code.

    From 10 on nothing is clipped, and the number sets the rate: a step is sigmas/Q standard deviations. A row of one
    weight has none; it deviates from zero.
    """
    weight = weight.float()
    deviation_R = weight.std(dim=1) if weight.size(1) > 1 else weight[:, 0].abs()
    return (sigmas * deviation_R / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def coarse_scales(scales: Tensor, mantissa_bits: int) -> Tensor:
    """Float32 scales of any shape, rounded to so many bits behind the leading one: they differ less, and pack better.

    At 3 bits no scale moves by more than 6 %; codes formed with the new one are as good as those of the old one.
    """
    mantissa, exponent = torch.frexp(scales)
    steps = 2.0 ** (mantissa_bits + 1)
    return torch.ldexp((mantissa * steps).round() / steps, exponent)


def nearest_codes(weight: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Codes int8 (R, C) of a float32 matrix at float32 row scales: round half to even, clamp to ±Q."""
    Q = largest_code(bits)
    return (weight / scale[:, None]).round_().clamp_(-Q, Q).to(torch.int8)


def best_of(weight: Tensor, candidates: Sequence[Quantized]) -> int:
    """Which candidate has the smallest squared error over the whole float32 matrix; the first of equals."""
    errors = [float((weight - candidate.dequantize()).square().mean()) for candidate in candidates]
    return errors.index(min(errors))


def searched_rows(weight: Tensor, scales: Tensor, *, bits: int) -> tuple[Quantized, int]:
    """A matrix (R, C) rounded at the best of float32 candidate scales (P, R), and the index of those."""
    weight = weight.float()
    candidates = [Quantized(nearest_codes(weight, scale.float(), bits=bits), scale, bits) for scale in scales.half()]
    best = best_of(weight, candidates)
    return candidates[best], best


def plain_rows(weight: Tensor, scale: Tensor, *, bits: int) -> Quantized:
    """A matrix (R, C) rounded at float32 scales (R,), as the records treat embedding tables.

    As theirs, the codes are formed with the float32 scale and decoded with its float16 rounding (an error of at most
    2^-11), except where float16 has too few bits left for that.
    """
    rounded = scale.half()
    scale = torch.where(scale < SMALLEST_NORMAL_SCALE, rounded.float(), scale)
    return Quantized(nearest_codes(weight.float(), scale, bits=bits), rounded, bits)
