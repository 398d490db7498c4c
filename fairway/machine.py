"""What this machine has: GPUs, memory, disk, libraries, and servers that it reaches. Nothing here changes anything."""

import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fairway.model.backends import attention_backend

GIB = 2**30
# How long to wait for a server's answer, in seconds.
PATIENCE_S = 3


def description() -> list[str]:
    """Three lines on the GPUs, on the libraries and the memory, and on how the network attends here."""
    gpus = gpu_bytes()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(len(gpus))})) or "none"
    rows, packed = (attention(packed=packed) for packed in (False, True))
    return [
        f"GPUs       {len(gpus)}: {names}; driver {_driver()}, CUDA of PyTorch {torch.version.cuda or 'none'}",
        f"PyTorch    {torch.__version__}, Python {platform.python_version()}, {cores()} CPU cores, "
        f"{ram_bytes() / GIB:.0f} GiB of memory, {free_disk_bytes() / 1e9:.0f} GB free here",
        f"Attention  {rows} for rows, {packed} for packed documents"
        + ("" if not gpus or packed == "flash4" else "; pip install flash-attn-4 makes training 3 to 16 % faster"),
    ]


def gpu_bytes() -> list[int]:
    """The bytes of memory of every GPU."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def visible_device(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES has to be for a process that is to see one of the GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ram_bytes() -> int:
    """The bytes of memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk_bytes() -> int:
    """The free bytes of the disk that holds the working directory."""
    return shutil.disk_usage(".").free


def attention(*, packed: bool) -> str:
    """The name of the attention backend that the records' network gets here (model/backends.py)."""
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    return attention_backend(device, torch.bfloat16, 64, length=2048, packed=packed)


def _driver() -> str:
    """The version of the GPU driver, or "none"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return lines[0] if lines else "none"


@cache
def pin_files() -> list[str]:
    """The files that pin packages for this machine. If two pin the same package, the later file counts."""
    return ["requirements.txt", *(["requirements-gpu.txt"] if torch.cuda.device_count() else [])]


def unpinned() -> str:
    """A list of the packages whose installed version is not the pinned one, with that version; "" if there is none."""
    lines = [line for file in pin_files() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return ", ".join(f"{name}: {_installed(name)}" for name, wanted in pins.items() if _installed(name) != wanted)


def _installed(name: str) -> str:
    """The installed version of a package without a build's own suffix such as +cpu, or "missing"."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "missing"


@cache
def answers(url: str) -> bool:
    """Whether a server answers at all, be it with an error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@cache
def pip_finds(name: str) -> bool:
    """Whether pip, as it is configured here, finds a package of that name on its index."""
    options = ["--timeout", str(PATIENCE_S), "--retries", "0", "--disable-pip-version-check"]
    try:
        command = [sys.executable, "-m", "pip", "index", "versions", *options, name]
        return subprocess.run(command, capture_output=True, timeout=4 * PATIENCE_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False
