"""Sets of named tensors on disk: safetensors, written whole, read with their shapes checked."""

from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from stages.errors import UserError
from stages.files import require_file, write_atomic


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (any dtype and shape, on any device) under their names, atomically."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read what save_tensors wrote, on the CPU. Raises UserError when the file is missing or damaged."""
    try:
        return load_file(require_file(path, made_by))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); run `{made_by}` again") from None
