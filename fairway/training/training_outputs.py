"""What a finished run leaves in artifacts/train/<seed>: its weights and curves, and train.json with its figures.

The figures include the machine, the libraries and the commit, without which step times and losses cannot be compared.
"""

import json
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fairway.model.backends import attention_backend
from fairway.model.config import ModelConfig
from fairway.runtime.distributed import World
from fairway.runtime.files import output_folder, save_tensors, write_atomic
from fairway.training.loop import Trained
from fairway.training.train_settings import TrainSettings


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
