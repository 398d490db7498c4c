"""What a finished run leaves in artifacts/train/<seed>: weights, figures, and where it took place."""

import json
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fairway.model.backends import attention_backend
from fairway.model.config import ModelConfig
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.runtime.files import output_folder, save_tensors, write_atomic
from fairway.training.loop import Trained
from fairway.training.train_settings import TrainSettings


def write_outputs(
    folder: Path, trained: Trained, config: ModelConfig, settings: TrainSettings, world: World, *, live: Path
) -> None:
    """Write one safetensors file a kind of weights, train.json, and a copy of the curves in `live`."""
    report = {
        "steps": trained.steps,
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
    """Machine, libraries, attention backend, processes and commit, fit for JSON; None where there is no such thing."""
    cuda = world.device.type == "cuda"
    packed = settings.loader.kind == "packed"
    length = settings.micro_batch_tokens if packed else config.seq_len
    return {
        "attention": attention_backend(world.device, world.compute_dtype, length=length, packed=packed),
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
    """The most memory this process held: allocated on the GPU, or resident on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    # In KiB, but in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _commit() -> str | None:
    """The commit of the code, with "+changes" if files of fairway/ or stages/ differ from it; None outside of git."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--", "fairway", "stages"):
        return f"{commit}+changes"
    return commit


def _output(*command: str) -> str | None:
    """First line of a command's output; None if it fails, says nothing or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parents[2])
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


@contextmanager
def memory_named(settings: TrainSettings, world: World) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError that names the batch size and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"params.yaml: train.micro_batch_tokens: {settings.micro_batch_tokens} tokens a pass do not fit into the "
            f"memory of {_device(world)}; lower it (train.batch_tokens may stay: a step then takes more passes)"
        ) from error


def _device(world: World) -> str:
    if world.device.type != "cuda":
        return str(world.device)
    device = torch.cuda.get_device_properties(world.device)
    return f"{device.name} ({device.total_memory / 2**30:.0f} GiB)"
