"""Where a run took place: what one needs to know before comparing its seconds with another's."""

import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from model.backends import attention_backend
from stages.distributed import World
from stages.params import Params


def environment(world: World, params: Params) -> dict[str, Any]:
    """Machine, libraries, attention backend, processes and commit, fit for JSON; None where there is no such thing."""
    cuda = world.device.type == "cuda"
    packed = params.train.loader.kind == "packed"
    length = params.train.micro_batch_tokens if packed else params.model.seq_len
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
    """The commit of the code, with "+changes" if files of model/ or stages/ differ from it; None outside of git."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--", "model", "stages"):
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
