"""What stages behind training need that no stage makes: better missed before training than after."""

import shutil
from pathlib import Path

from stages.errors import UserError
from stages.params import Params


def check_ahead(params: Params) -> None:
    """Raise UserError if quantize or compress would miss a file or a program."""
    gptq = params.quantize.gptq
    if gptq and gptq.path and not Path(gptq.path).is_file():
        raise UserError(f"params.yaml: quantize.gptq.path: {gptq.path}: no such file; expected UTF-8 text")
    if params.compress.codec == "lrzip" and not shutil.which("lrzip"):
        raise UserError(
            "params.yaml: compress.codec: lrzip is not installed; expected the program of the package lrzip"
        )
