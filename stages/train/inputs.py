"""What a training run is given: params and tokens that fit each other and the processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from stages.ahead import check_ahead
from stages.distributed import World, alone
from stages.errors import UserError
from stages.params import CoprimeLoader, PackedLoader, Params, SequentialLoader, ShuffledLoader, Train
from stages.tokenize.shards import shard_paths
from stages.tokenize.validation import load_validation, verify_tokens
from stages.train.checkpoint import only_run
from stages.train.loader import Order, Sequential, Stream, Tokens
from stages.train.packing import PackedRows, document_bounds
from stages.train.windows import CoprimeWindows, ShuffledWindows, name_seed

ALONE = alone(torch.device("cpu"))


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
    train_stream(params, tokens, ALONE).next_batch()
    check_ahead(params)
    with only_run(resume):
        pass


def check_world(settings: Train, world: World) -> None:
    """Raise UserError unless the processes that were started divide the micro-batches of a step."""
    micro_batches = settings.batch_tokens // settings.micro_batch_tokens
    if micro_batches % world.size:
        raise UserError(
            f"params.yaml: train: {world.size} processes were started, which must divide the {micro_batches} "
            "micro-batches of a step (batch_tokens / micro_batch_tokens)"
        )


def train_stream(params: Params, tokens: Path, world: World) -> Stream:
    """This process's micro-batches of the train split, in the order that train.loader names."""
    shards = Tokens(shard_paths(tokens, "train"), vocab_size=params.model.vocab_size)
    loader, row, segment = params.train.loader, params.model.seq_len, None
    order = _order(params.train, shards, row)
    if loader.kind == "packed":
        segment = partial(document_bounds, cut=row, bucket=loader.bucket)
        row = params.train.micro_batch_tokens
    return Stream(shards, order, row=row, rank=world.rank, size=world.size, segment=segment)


def _order(settings: Train, shards: Tokens, window: int) -> Order:
    """The Order of train.loader. As many processes as micro-batches are emulated, whatever the number that runs."""
    tokens = settings.micro_batch_tokens
    make = ORDERS[settings.loader.kind]
    return make(settings.loader, shards, window=window, micro_batches=settings.batch_tokens // tokens, tokens=tokens)


def _sequential(loader: SequentialLoader, shards: Tokens, *, window: int, micro_batches: int, tokens: int) -> Order:
    return Sequential(micro_batches=micro_batches, micro_batch_tokens=tokens)


def _packed(loader: PackedLoader, shards: Tokens, *, window: int, micro_batches: int, tokens: int) -> Order:
    return PackedRows(shards, micro_batches=micro_batches, micro_batch_tokens=tokens)


def _shuffled(loader: ShuffledLoader, shards: Tokens, *, window: int, micro_batches: int, tokens: int) -> Order:
    return ShuffledWindows(shards, window=window, micro_batches=micro_batches, windows=tokens // window)


def _coprime(loader: CoprimeLoader, shards: Tokens, *, window: int, micro_batches: int, tokens: int) -> Order:
    seed = name_seed([loader.names % i for i in range(len(shards.lengths))])
    return CoprimeWindows(shards, window=window, micro_batches=micro_batches, windows=tokens // window, seed=seed)


# Data orders by the kind of loader that params.yaml names, each made of its section.
ORDERS: dict[str, Callable[..., Order]] = {
    "sequential": _sequential,
    "packed": _packed,
    "shuffled": _shuffled,
    "coprime": _coprime,
}
