"""Which class a tensor belongs to, and which tensors stay float16 (PR #1150, #1172 and #1488, by neutral names)."""

from typing import Literal, get_args

from torch import Tensor

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
