"""What a training run is given: its stream of micro-batches and its fingerprint, and whether its settings fit.

The settings of a step must fit the processes that were started and the memory of the device.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from fairway.model.config import ModelConfig
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, stage_sources_sha256
from fairway.tokens.data_orders import (
    CoprimeLoader,
    CoprimeWindows,
    PackedLoader,
    PackedRows,
    Sequential,
    SequentialLoader,
    ShuffledLoader,
    ShuffledWindows,
    document_bounds,
    name_seed,
)
from fairway.tokens.loader import Order, Stream, Tokens
from fairway.tokens.shards import shard_paths
from fairway.training.train_settings import TrainSettings


def fingerprint(config: ModelConfig, settings: TrainSettings, seed: int, tokens: Path) -> str:
    """SHA-256 over all that decides a run, as 64 hexadecimal digits. Resume points of another run have another one.

    It covers the code that dvc.yaml lists for training, the sections model and train of params.yaml, the seed, and the
    tokens by their meta.json, which holds their checksums.
    """
    experiment = {
        "code": stage_sources_sha256("train"),
        "model": config.model_dump(),
        "train": settings.model_dump(),
        "seed": seed,
        "tokens": file_sha256(tokens / "meta.json"),
    }
    return hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()


def check_world(settings: TrainSettings, world: World) -> None:
    """Raise UserError unless the micro-batches of a step can be shared equally by the processes that were started."""
    micro_batches = settings.batch_tokens // settings.micro_batch_tokens
    if micro_batches % world.size:
        raise UserError(
            f"params.yaml: train: {world.size} processes were started, which must divide the {micro_batches} "
            "micro-batches of a step (batch_tokens / micro_batch_tokens)"
        )


@contextmanager
def memory_named(settings: TrainSettings, world: World) -> Iterator[None]:
    """Turn a GPU's lack of memory inside the block into a UserError that names the batch size and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"params.yaml: train.micro_batch_tokens: {settings.micro_batch_tokens} tokens a pass do not fit into the "
            f"memory of {_device(world)}; lower it (train.batch_tokens may stay: a step then takes more passes)"
        ) from error


def _device(world: World) -> str:
    """The device by its name, with the size of its memory if it is a GPU."""
    if world.device.type != "cuda":
        return str(world.device)
    device = torch.cuda.get_device_properties(world.device)
    return f"{device.name} ({device.total_memory / 2**30:.0f} GiB)"


def train_stream(config: ModelConfig, settings: TrainSettings, tokens: Path, world: World) -> Stream:
    """This process's micro-batches of the training tokens, in the order that train.loader names.

    Raises UserError if the shards are missing, damaged or too short for that order.
    """
    shards = Tokens(shard_paths(tokens, "train"), vocab_size=config.vocab_size)
    loader, row, segment = settings.loader, config.seq_len, None
    order = _order(settings, shards, row)
    if loader.kind == "packed":
        segment = partial(document_bounds, cut=row, bucket=loader.bucket)
        row = settings.micro_batch_tokens
    return Stream(shards, order, row=row, rank=world.rank, size=world.size, segment=segment)


def _order(settings: TrainSettings, shards: Tokens, window: int) -> Order:
    """The Order of train.loader. It depends on the number of micro-batches of a step, not on that of processes."""
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


# Data orders by the kind of loader that params.yaml names, each made of its section. A table, so that the program that
# ships carries the one order that its record uses.
ORDERS: dict[str, Callable[..., Order]] = {
    "sequential": _sequential,
    "packed": _packed,
    "shuffled": _shuffled,
    "coprime": _coprime,
}
