"""Integer codes and row scales: what quantize makes, compress packs and evaluation runs.

Which class a tensor belongs to, and which tensors stay float16 (PR #1150, #1172 and #1488, by neutral names).
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
    """A correction A·B of rank k to a matrix (R, C) (quantization/lqer.py).

    A = a * a_scale: int8 (R, k) and float16 (1,). B = b, flattened, times b_scale of its group: int8 (k, C) and float16
    (groups,), all groups equally long.
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
    """A matrix (R, C) as W_rc = codes_rc * scale_r: int8 within ±largest_code(bits), float16 (R,).

    Where there is a correction it is added.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    correction: LowRank | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when shapes, types, code range or scales do not belong together."""
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


# By parameter name. A plain tensor is float16 of any shape, stored as it is.
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
    """Order-0 entropy in bits per symbol: what a coder with this one histogram, and nothing else, needs."""
    p = histogram[histogram > 0].double() / histogram.sum()
    return float(-(p * p.log2()).sum())


def save_codes(folder: Path, state: QuantizedState) -> None:
    """Write codes.safetensors. A matrix is `name/codes`, `name/scale` and `name/bits` (0-D uint8).

    A correction adds `name/a`, `name/b`, `name/a_scale` and `name/b_scale`.
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
    """Read what save_codes wrote. Raises UserError when the file is missing or its tensors do not belong together."""
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
    """The class of a parameter: the records count the projections of the bigram and value tables as attention."""
    if name == "embed.token":
        return "embed"
    if ".mlp." in name:
        return "mlp"
    if ".attn." in name or name.endswith(".proj"):
        return "attn"
    return "other"


def stays_float(weight: Tensor, passthrough_elements: int) -> bool:
    """Whether a tensor is stored as float16: vectors, scalars, stacks, and matrices of at most so many elements."""
    return weight.ndim != 2 or weight.numel() <= passthrough_elements
