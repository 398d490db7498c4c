"""What a training run is given: params and tokens that fit each other and the processes."""

import hashlib
import json
from functools import partial
from pathlib import Path

from fairway.model.config import ModelConfig
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.fingerprint import file_sha256, stage_sources_sha256
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
    """SHA-256 over what decides a run: its code (dvc.yaml), the sections model and train of params.yaml, the seed, and
    the tokens' meta.json."""
    experiment = {
        "code": stage_sources_sha256("train"),
        "model": config.model_dump(),
        "train": settings.model_dump(),
        "seed": seed,
        "tokens": file_sha256(tokens / "meta.json"),
    }
    return hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()


def check_world(settings: TrainSettings, world: World) -> None:
    """Raise UserError unless the processes that were started divide the micro-batches of a step."""
    micro_batches = settings.batch_tokens // settings.micro_batch_tokens
    if micro_batches % world.size:
        raise UserError(
            f"params.yaml: train: {world.size} processes were started, which must divide the {micro_batches} "
            "micro-batches of a step (batch_tokens / micro_batch_tokens)"
        )


def train_stream(config: ModelConfig, settings: TrainSettings, tokens: Path, world: World) -> Stream:
    """This process's micro-batches of the train split, in the order that train.loader names."""
    shards = Tokens(shard_paths(tokens, "train"), vocab_size=config.vocab_size)
    loader, row, segment = settings.loader, config.seq_len, None
    order = _order(settings, shards, row)
    if loader.kind == "packed":
        segment = partial(document_bounds, cut=row, bucket=loader.bucket)
        row = settings.micro_batch_tokens
    return Stream(shards, order, row=row, rank=world.rank, size=world.size, segment=segment)


def _order(settings: TrainSettings, shards: Tokens, window: int) -> Order:
    """The Order of train.loader. As many processes as micro-batches are emulated, whatever the number that runs."""
    tokens = settings.micro_batch_tokens
    micro_batches, windows = settings.batch_tokens // tokens, tokens // window
    match settings.loader:
        case SequentialLoader():
            return Sequential(micro_batches=micro_batches, micro_batch_tokens=tokens)
        case PackedLoader():
            return PackedRows(shards, micro_batches=micro_batches, micro_batch_tokens=tokens)
        case ShuffledLoader():
            return ShuffledWindows(shards, window=window, micro_batches=micro_batches, windows=windows)
        case CoprimeLoader(names=names):
            seed = name_seed([names % i for i in range(len(shards.lengths))])
            return CoprimeWindows(shards, window=window, micro_batches=micro_batches, windows=windows, seed=seed)
