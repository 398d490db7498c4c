"""Quantized weights: integer codes, a scale for each row, and corrections of low rank. quantize makes them, compress
packs them, and evaluation multiplies them out.

Here also stands which class of tensors a parameter belongs to, and which parameters stay float16. Both are as in PR
#1150, #1172 and #1488, told by the neutral names of parameters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fairway.runtime.errors import UserError
from fairway.runtime.files import load_tensors, save_tensors

FILE_NAME = "codes.safetensors"


def largest_code(bits: int) -> int:
    """Q = 2^(bits-1) - 1. The most negative two's-complement code is never used."""
    return 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class LowRank:
    """A correction A·B of rank k to a matrix (R, C), itself quantized (quantization/lqer.py).

    A is `a`, int8 (R, k), times `a_scale`, float16 (1,). B is `b`, int8 (k, C), which is flattened and cut into groups
    of equal length, each times its scale in `b_scale`, float16 (groups,).
    """

    a: Tensor
    b: Tensor
    a_scale: Tensor
    b_scale: Tensor

    def product(self) -> Tensor:
        """The float32 matrix (R, C)."""
        B = self.b.float().view(len(self.b_scale), -1) * self.b_scale.float()[:, None]
        return (self.a.float() * self.a_scale.float()) @ B.view(self.b.shape)


@dataclass(frozen=True)
class Quantized:
    """A matrix (R, C) as codes times the scale of their row, plus the correction if there is one.

    `codes` are int8 (R, C) within ±largest_code(bits), and `scale` is float16 (R,).
    """

    codes: Tensor
    scale: Tensor
    bits: int
    correction: LowRank | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if shapes or dtypes do not fit, codes are too large, or a scale is not a positive number."""
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2 or self.scale.dtype != torch.float16:
            raise ValueError("expected int8 codes of two dimensions and float16 scales")
        if self.scale.shape != self.codes.shape[:1]:
            raise ValueError(f"{len(self.codes)} rows of codes but scales of shape {tuple(self.scale.shape)}")
        if not 2 <= self.bits <= 8 or int(self.codes.to(torch.int16).abs().max()) > largest_code(self.bits):
            raise ValueError(f"codes exceed {self.bits} bits")
        if not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            raise ValueError("a scale is not a positive number")

    def dequantize(self) -> Tensor:
        """The float32 matrix (R, C)."""
        rounded = self.codes.float() * self.scale.float()[:, None]
        return rounded if self.correction is None else rounded + self.correction.product()


# The quantized network by parameter name. A plain tensor is float16, has any shape, and is stored as it is.
QuantizedState = dict[str, Quantized | Tensor]


def dequantize(state: QuantizedState) -> dict[str, Tensor]:
    """Float32 weights by parameter name."""
    return {
        name: value.dequantize() if isinstance(value, Quantized) else value.float() for name, value in state.items()
    }


def code_histogram(codes: Tensor) -> Tensor:
    """How often each value from -128 to 127 occurs, int64 (256,)."""
    return torch.bincount(codes.flatten().int() + 128, minlength=256)


def entropy_bits(histogram: Tensor) -> float:
    """The entropy of order 0 in bits per symbol: what a coder needs that knows this one histogram and nothing else."""
    p = histogram[histogram > 0].double() / histogram.sum()
    return float(-(p * p.log2()).sum())


def save_codes(folder: Path, state: QuantizedState) -> None:
    """Write codes.safetensors.

    A quantized matrix is written as `name/codes`, `name/scale` and `name/bits` (0-D uint8), its correction as `name/a`,
    `name/b`, `name/a_scale` and `name/b_scale`. Other tensors are written under their names.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Quantized):
            tensors[f"{name}/codes"], tensors[f"{name}/scale"] = value.codes, value.scale
            tensors[f"{name}/bits"] = torch.tensor(value.bits, dtype=torch.uint8)
            if value.correction:
                tensors |= {f"{name}/{part}": tensor for part, tensor in vars(value.correction).items()}
        else:
            tensors[name] = value
    save_tensors(folder / FILE_NAME, tensors)


def load_codes(folder: Path) -> QuantizedState:
    """Read what save_codes wrote. Raises UserError if the file is missing or its tensors do not fit together."""
    path = folder / FILE_NAME
    made_by = f"python -m stages.quantize {folder.name}"
    tensors = load_tensors(path, made_by)
    state: QuantizedState = {}
    for key, value in tensors.items():
        name, _, part = key.partition("/")
        if not part:
            state[name] = value
        elif part == "codes":
            try:
                bits, correction = int(tensors[f"{name}/bits"]), _correction(tensors, name)
                state[name] = Quantized(value, tensors[f"{name}/scale"], bits, correction)
            except (KeyError, ValueError) as error:
                raise UserError(f"{path}: {name}: {error}; run `{made_by}` again") from None
    return state


def _correction(tensors: dict[str, Tensor], name: str) -> LowRank | None:
    if f"{name}/a" not in tensors:
        return None
    return LowRank(*(tensors[f"{name}/{part}"] for part in ("a", "b", "a_scale", "b_scale")))


TensorClass = Literal["attn", "mlp", "embed", "other"]
TENSOR_CLASSES: tuple[TensorClass, ...] = get_args(TensorClass)


def tensor_class(name: str) -> TensorClass:
    """The class of a parameter. The records count the projections of the bigram and value tables as attention."""
    if name == "embed.token":
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name or name.endswith(".proj"):
        return "attn"
    return "other"


def stays_float(weight: Tensor, passthrough_elements: int) -> bool:
    """Whether a tensor is stored as float16: all but matrices, and matrices of at most `passthrough_elements`."""
    return weight.ndim != 2 or weight.numel() <= passthrough_elements
