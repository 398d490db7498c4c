"""Looks at everything that a training run and the stages behind it need, before the run begins.

Training is what costs, so a fault that only shows behind it costs most: a missing file or program is to be told at
once. What is looked at first is what takes no time.
"""

from pathlib import Path

import torch

from fairway.codec.byte_codecs import lrzip_program
from fairway.params import Params
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError
from fairway.runtime.resume import only_run
from fairway.tokens.validation import load_validation, verify_tokens
from fairway.training.training_inputs import train_stream


def check_training(params: Params, seed: int, tokens: Path, resume: Path) -> None:
    """Check that a seed can be trained on the folder `tokens`, and that the stages behind it will find what they need.

    `resume` is the folder of the run's resume points, which no other run may be using. Raises UserError at the first
    fault. Reads and hashes every shard in the end: seconds on the 16 GB of a record.
    """
    if seed not in params.seeds:
        raise UserError(f"params.yaml: seeds: {seed} is not one of {params.seeds}")
    check_gpus(params)
    check_later_stages(params)
    with only_run(resume):
        pass
    check_tokens(params, tokens)


def check_gpus(params: Params) -> None:
    """Raise UserError if this machine has GPUs, but not one for each process. Without any, processes share the CPU."""
    gpus = torch.cuda.device_count()
    if gpus and params.processes > gpus:
        raise UserError(f"params.yaml: processes: {params.processes} on a machine with {gpus} GPUs")


def check_later_stages(params: Params) -> None:
    """Raise UserError if a file that quantize reads, or a program that compress starts, is not there."""
    gptq = params.quantize.gptq
    if gptq and gptq.path and not Path(gptq.path).is_file():
        raise UserError(f"params.yaml: quantize.gptq.path: {gptq.path}: no such file; expected UTF-8 text")
    if params.compress.codec == "lrzip":
        lrzip_program()


def check_tokens(params: Params, tokens: Path) -> None:
    """Raise UserError unless the shards in `tokens` are sound, fit the model, and suffice for a step."""
    verify_tokens(tokens, vocab_size=params.model.vocab_size)
    load_validation(tokens, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    train_stream(params.model, params.train, tokens, alone(torch.device("cpu"))).next_batch()
