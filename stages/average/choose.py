"""Which file of a training run holds the weights that go on."""

from pathlib import Path

from torch import Tensor

from stages.errors import UserError
from stages.params import Average
from stages.weights import load_tensors


def kept_kind(settings: Average) -> str:
    """What training calls the chosen weights: "last", "ema_<decay>" or "swa"."""
    return f"ema_{settings.ema_decay}" if settings.method == "ema" else settings.method


def kept_weights(folder: Path, settings: Average, *, made_by: str) -> dict[str, Tensor]:
    """The chosen weights by name, in the dtypes of training. Raises UserError if that run did not keep them."""
    path = folder / f"{kept_kind(settings)}.safetensors"
    if not path.is_file() and (folder / "last.safetensors").is_file():
        kept = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors")))
        raise UserError(f"params.yaml: average.method: {settings.method} needs {path}; training kept only {kept}")
    return load_tensors(path, made_by)
