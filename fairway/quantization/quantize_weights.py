"""All weights of a network to integer codes and scales of rows, each tensor by the rule of its class.

A small tensor stays float16. A matrix that has a Hessian is rounded by GPTQ, every other one to nearest. The matrices
with the largest errors may get a low-rank correction.

Legend: P candidate scales of a row, R rows, C columns.

Source: PR #1150 and #1488 (to nearest), #1172 (GPTQ), #1855 (GPTQ with clips by sigma, corrections); quantize.md 3.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.codec.codes import Quantized, QuantizedState, code_histogram, entropy_bits, stays_float, tensor_class
from fairway.quantization.clip import coarse_scales, percentile_scales, plain_rows, searched_rows, sigma_scales
from fairway.quantization.gptq import GptqSettings, gptq
from fairway.quantization.lqer import LqerSettings, low_rank
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section


class Bits(Section):
    """How many bits the codes of each class of tensor have."""

    attn: int = Field(ge=4, le=8)
    mlp: int = Field(ge=4, le=8)
    embed: int = Field(ge=4, le=8)
    other: int = Field(ge=4, le=8)


class Sigmas(Section):
    """The clip of the rows of each class of tensor, in standard deviations of the row."""

    attn: float = Field(gt=0)
    mlp: float = Field(gt=0)
    embed: float = Field(gt=0)
    other: float = Field(gt=0)


class QuantizeSettings(Section):
    """How weights become integer codes and scales of rows."""

    # "percentile" rounds every matrix to nearest; "gptq" rounds the classes that the section gptq names by GPTQ.
    method: Literal["percentile", "gptq"]
    bits: Bits
    clip_percentiles: list[float] = Field(min_length=1)
    embed_percentile: float = Field(gt=0, le=1)
    min_clip: float = Field(ge=0)
    passthrough_elements: int = Field(ge=0)
    # Instead of percentiles and min_clip.
    clip_sigmas: Sigmas | None
    gptq: GptqSettings | None
    # What codes GPTQ rounds to: "scalar", all multiples of a step, or "trellis", those that codec/trellis.py allows.
    grid: Literal["scalar", "trellis"]
    lqer: LqerSettings | None
    # Bits of a scale's mantissa: 10 is float16. Few are enough, since codes are formed with the scale as rounded.
    scale_mantissa_bits: int = Field(ge=2, le=10)
    # Widen all steps until model.bin has this size.
    target_bytes: int | None = Field(gt=0)

    @model_validator(mode="after")
    def _agree(self) -> "QuantizeSettings":
        if any(not 0 < p <= 1 for p in self.clip_percentiles):
            raise ValueError(f"clip_percentiles {self.clip_percentiles}: each is a quantile in (0, 1]")
        if (self.method == "gptq") != (self.gptq is not None):
            raise ValueError("gptq is the section of method: gptq, and null for every other method")
        if self.grid == "trellis" and self.gptq is None:
            raise ValueError("grid: trellis needs method: gptq, expected grid: scalar")
        if self.grid == "trellis" and self.gptq and any(getattr(self.bits, kind) > 7 for kind in self.gptq.classes):
            raise ValueError("grid: trellis makes codes of one bit more, expected at most 7 bits for gptq.classes")
        return self


def quantize_state(
    weights: dict[str, Tensor],
    settings: QuantizeSettings,
    *,
    hessians: dict[str, Tensor] | None = None,
    coarseness: float = 1.0,
) -> tuple[QuantizedState, dict[str, int]]:
    """Round the weights of a network, given by name in any float dtype.

    A matrix with a Hessian, float32 (C, C), is rounded by GPTQ, the others to nearest. `coarseness` multiplies every
    scale. Returns the codes by name, and which of its candidate clips each rounded matrix took, counted from 0. Raises
    UserError on a weight that is no finite float16 number.
    """
    for name, weight in weights.items():
        _check_finite(name, weight)
    matrices = {
        name: weight for name, weight in weights.items() if not stays_float(weight, settings.passthrough_elements)
    }
    scales = {name: _candidate_scales(name, weight, settings, coarseness) for name, weight in matrices.items()}
    rounded = _round_with_hessians(matrices, scales, hessians or {}, settings)
    for name in matrices.keys() - rounded.keys():
        rounded[name] = _round_to_nearest(name, matrices[name], scales[name], settings)
    found = {name: matrix for name, (matrix, _) in rounded.items()}
    if settings.lqer:
        found |= _corrected(matrices, found, settings.lqer)
    chosen = {name: best for name, (_, best) in rounded.items()}
    return {name: found[name] if name in found else weight.half() for name, weight in weights.items()}, chosen


LARGEST_FLOAT16 = torch.finfo(torch.float16).max


def _check_finite(name: str, weight: Tensor) -> None:
    """Raise UserError if a weight is NaN or infinite, or so large that float16 would make it infinite."""
    bad = int((~(weight.float().abs() <= LARGEST_FLOAT16)).sum())
    if bad:
        raise UserError(
            f"tensor {name}: {bad} of {weight.numel()} weights are not finite float16 numbers: training has diverged; "
            "expected |weight| <= 65504 (params.yaml: lower train.muon.lr, train.adamw's rates or adapt.lr)"
        )


def _bits(name: str, settings: QuantizeSettings) -> int:
    bits: int = getattr(settings.bits, tensor_class(name))
    return bits


def _percentiles(name: str, settings: QuantizeSettings) -> list[float]:
    """The percentiles to choose from: as in the records several for the layers' matrices, one for all others."""
    return settings.clip_percentiles if tensor_class(name) in ("attn", "mlp") else [settings.embed_percentile]


# The bits of a float16 number's mantissa, not counting the leading one.
FLOAT16_MANTISSA_BITS = 10


def _candidate_scales(name: str, weight: Tensor, settings: QuantizeSettings, coarseness: float) -> Tensor:
    """Float32 scales (P, R) of a matrix (R, C), multiplied by `coarseness` and then rounded to scale_mantissa_bits."""
    bits = _bits(name, settings)
    if settings.clip_sigmas:
        scales_PR = sigma_scales(weight, getattr(settings.clip_sigmas, tensor_class(name)), bits=bits)[None]
    else:
        scales_PR = percentile_scales(weight, _percentiles(name, settings), bits=bits, min_clip=settings.min_clip)
    scales_PR = coarseness * scales_PR
    if settings.scale_mantissa_bits == FLOAT16_MANTISSA_BITS:
        return scales_PR
    return coarse_scales(scales_PR, settings.scale_mantissa_bits)


def _round_to_nearest(
    name: str, weight: Tensor, scales_PR: Tensor, settings: QuantizeSettings
) -> tuple[Quantized, int]:
    """A matrix rounded to nearest at the best of its candidate scales, and which of them that is."""
    bits = _bits(name, settings)
    if not settings.clip_sigmas and len(scales_PR) == 1:
        return plain_rows(weight, scales_PR[0], bits=bits), 0
    return searched_rows(weight, scales_PR, bits=bits)


def _round_with_hessians(
    matrices: dict[str, Tensor], scales: dict[str, Tensor], hessians: dict[str, Tensor], settings: QuantizeSettings
) -> dict[str, tuple[Quantized, int]]:
    """The matrices that have a Hessian, rounded by GPTQ; those that agree in shape and bits go through it together."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in sorted(matrices.keys() & hessians.keys()):
        groups[matrices[name].shape, scales[name].shape, _bits(name, settings)].append(name)
    rounded: dict[str, tuple[Quantized, int]] = {}
    for names in groups.values():
        assert settings.gptq is not None, "whoever collects Hessians has the section"
        found = gptq(
            torch.stack([matrices[name].float() for name in names]),
            torch.stack([hessians[name] for name in names]),
            torch.stack([scales[name] for name in names]),
            bits=_bits(names[0], settings),
            damping=settings.gptq.damping,
            block_size=settings.gptq.block_size,
            grid=settings.grid,
        )
        rounded |= dict(zip(names, found, strict=True))
    return rounded


def _corrected(
    matrices: dict[str, Tensor], found: dict[str, Quantized], settings: LqerSettings
) -> dict[str, Quantized]:
    """The matrices with the largest rounding errors, each with its low-rank correction.

    Errors are compared by their Frobenius norm, as in PR #1855. The rank is settings.rank, or less where a matrix has
    fewer rows or columns. Raises UserError if settings.group does not divide the number of B's elements.
    """
    errors = {name: matrices[name].float() - matrix.dequantize() for name, matrix in found.items()}
    worst = sorted(errors, key=lambda name: float(errors[name].norm()), reverse=True)[: settings.tensors]
    ranks = {name: min(settings.rank, *errors[name].shape) for name in worst}
    for name, rank in ranks.items():
        if rank * errors[name].size(1) % settings.group:
            raise UserError(
                f"params.yaml: quantize.lqer.group ({settings.group}) must divide {rank} * {errors[name].size(1)}, the "
                f"rank and columns of {name}"
            )
    return {
        name: replace(found[name], correction=low_rank(errors[name], rank=rank, group=settings.group))
        for name, rank in ranks.items()
    }


def quantization_report(
    weights: dict[str, Tensor], state: QuantizedState, chosen: dict[str, int], settings: QuantizeSettings
) -> dict[str, dict[str, Any]]:
    """What was done to every tensor: its class, shape and bits (16 if it stays float16).

    Of a rounded matrix also its clip, the mean squared error, the order-0 entropy of its codes in bits per weight, and
    whether it has a correction. Of codes on a trellis it is the entropy of their indices, which is what is stored.
    `state` and `chosen` are what quantize_state made of the weights.
    """
    report: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        report[name] = {"class": tensor_class(name), "shape": list(weight.shape), "bits": 16}
        matrix = state[name]
        if isinstance(matrix, Quantized):
            by_trellis = settings.grid == "trellis" and matrix.bits > _bits(name, settings)
            report[name] |= _clip_facts(name, chosen[name], settings) | _measure(weight, matrix, by_trellis)
    return report


def _clip_facts(name: str, best: int, settings: QuantizeSettings) -> dict[str, float]:
    """What the report says of a matrix's clip; `best` is the number of the percentile that was chosen."""
    if settings.clip_sigmas:
        return {"sigmas": getattr(settings.clip_sigmas, tensor_class(name))}
    return {"percentile": _percentiles(name, settings)[best]}


def _measure(weight: Tensor, matrix: Quantized, by_trellis: bool) -> dict[str, Any]:
    """What the report says of a rounded matrix."""
    stored = matrix.codes >> 1 if by_trellis else matrix.codes
    return {
        "bits": matrix.bits,
        "mse": float((weight.float() - matrix.dequantize()).square().mean()),
        "entropy_bits": entropy_bits(code_histogram(stored)),
        "corrected": matrix.correction is not None,
    }
