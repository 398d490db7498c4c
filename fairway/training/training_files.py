"""What a training run is given, and what it leaves.

It is given a stream of micro-batches, and a fingerprint that its resume points are kept under. The settings of a step
must fit the processes that were started and the memory of the device.

It leaves in artifacts/train/<seed> its weights and curves, and train.json with its figures. These include the machine,
the libraries and the commit, without which step times and losses cannot be compared.
"""

import hashlib
import json
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fairway.model.backends import attention_backend
from fairway.model.config import ModelConfig
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, output_folder, save_tensors, stage_sources_sha256, write_atomic
from fairway.tokens.data_orders import (
    CoprimeLoader,
    CoprimeWindows,
    PackedLoader,
    PackedRows,
    Sequential,
    SequentialLoader,
    ShuffledLoader,
    ShuffledWindows,
    document_segmenter,
    name_seed,
)
from fairway.tokens.loader import Order, Stream, Tokens
from fairway.tokens.shards import shard_paths
from fairway.training.loop import Trained
from fairway.training.schedule import TrainSettings


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
    order = _order(settings, shards, config.seq_len)
    segment = document_segmenter(settings.loader, cut=config.seq_len)
    row = settings.micro_batch_tokens if segment else config.seq_len
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


def write_outputs(
    folder: Path,
    trained: Trained,
    config: ModelConfig,
    settings: TrainSettings,
    world: World,
    *,
    live: Path,
    start_s: float,
) -> None:
    """Write a safetensors file for each kind of weights, train.json, and a copy of the curves in the folder `live`.

    `start_s` are the seconds from the start of the stage to the call of train.
    """
    report = {
        "steps": trained.steps,
        "start_s": round(start_s, 3),
        "compile_s": round(trained.compile_s, 3),
        "wall_s": round(trained.clock_s, 3),
        "stopped_by": trained.stopped_by,
        "train_tokens": trained.steps * settings.batch_tokens,
        "step_ms": round(1000 * trained.clock_s / trained.steps, 3),
        "train_loss": trained.train_loss,
        "val_loss": trained.val_loss,
        "val_bpb": trained.val_bpb["last"],
        "val_bpb_by_weights": trained.val_bpb,
        "parameters": sum(weight.numel() for weight in trained.weights["last"].values()),
        "peak_memory_bytes": peak_memory_bytes(world),
        "environment": environment(world, config, settings),
    }
    with output_folder(folder) as out:
        for kind, weights in trained.weights.items():
            save_tensors(out / f"{kind}.safetensors", weights)
        write_atomic(out / "train.json", json.dumps(report, indent=2) + "\n")
        shutil.copytree(live, out / "live")


def environment(world: World, config: ModelConfig, settings: TrainSettings) -> dict[str, Any]:
    """The machine, libraries, attention backend, processes and commit, fit for JSON; None where one does not exist."""
    cuda = world.device.type == "cuda"
    packed = settings.loader.kind == "packed"
    length = settings.micro_batch_tokens if packed else config.seq_len
    return {
        "attention": attention_backend(
            world.device, world.compute_dtype, config.head_dim, length=length, packed=packed
        ),
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "compute_dtype": str(world.compute_dtype).removeprefix("torch."),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def peak_memory_bytes(world: World) -> int:
    """The most memory that this process held at a time: allocated on its GPU, or resident if it works on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    # ru_maxrss is in KiB, except on macOS, where it is in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _commit() -> str | None:
    """The commit of the code, followed by "+changes" if a file of fairway/ or stages/ differs from it.

    None if the code is in no git repository, or git is not installed.
    """
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--", "fairway", "stages"):
        return f"{commit}+changes"
    return commit


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails, prints nothing or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parents[2])
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
