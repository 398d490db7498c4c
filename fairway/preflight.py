"""What stages behind training need that no stage makes: better missed before training than after."""

import shutil
from pathlib import Path

import torch

from fairway.params import Params
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError
from fairway.runtime.resume import only_run
from fairway.tokens.validation import load_validation, verify_tokens
from fairway.training.training_inputs import train_stream


def check_ahead(params: Params) -> None:
    """Raise UserError if quantize or compress would miss a file or a program."""
    gptq = params.quantize.gptq
    if gptq and gptq.path and not Path(gptq.path).is_file():
        raise UserError(f"params.yaml: quantize.gptq.path: {gptq.path}: no such file; expected UTF-8 text")
    if params.compress.codec == "lrzip" and not shutil.which("lrzip"):
        raise UserError(
            "params.yaml: compress.codec: lrzip is not installed; expected the program of the package lrzip"
        )


def check_inputs(params: Params, seed: int, tokens: Path, resume: Path) -> None:
    """Look at everything a run needs: params, tokens, GPUs, and that no other run holds the resume folder.

    Raises UserError at the first fault. Hashes every shard: seconds on the records' 16 GB.
    """
    if seed not in params.seeds:
        raise UserError(f"params.yaml: seeds: {seed} is not one of {params.seeds}")
    gpus = torch.cuda.device_count()
    if gpus and params.processes > gpus:
        raise UserError(f"params.yaml: processes: {params.processes} on a machine with {gpus} GPUs")
    verify_tokens(tokens, vocab_size=params.model.vocab_size)
    load_validation(tokens, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    train_stream(params.model, params.train, tokens, alone(torch.device("cpu"))).next_batch()
    check_ahead(params)
    with only_run(resume):
        pass
