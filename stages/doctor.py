"""What this machine has and lacks for each record: a table of needs by records, and a line for what is missing.

Reads:  params.yaml (the experiment in hand), records/r*.yaml
Prints: this machine's GPUs, memory and libraries, then ✓ or ✗ per need and record, then what to do about each ✗. A
        params file with a fault is one line among these and has no column. Ends with status 0 whatever it finds.
Usage:  make doctor, or python -m stages.doctor
"""

import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from fairway.model.backends import attention_backend
from fairway.params import Params, load_params
from fairway.runtime.errors import UserError, run_stage
from fairway.tokens.hub import FetchHub
from fairway.tokens.sdists import FetchSdists

GIB = 2**30
# How long to wait for a server's answer, in seconds.
PATIENCE_S = 3
# Of one process that trains on a GPU, with its compilers; and of the laptop default on a CPU.
GPU_PROCESS_RAM, CPU_PROCESS_RAM = 4 * GIB, 2 * GIB
# Training a micro-batch of 98,304 tokens (benchmarks/RESULTS.md: 17 to 18 GiB, 32 GiB with a loop), and some room.
GPU_MEMORY, GPU_MEMORY_LOOPED = 22 * GIB, 38 * GIB
# Shards lie in the hub's cache and in data/docs, artifacts/tokens and DVC's cache, as copies where the file system
# knows no links.
COPIES, SHARD_BYTES, SEED_BYTES = 4, 2 * 10**8, 2 * 10**9


@dataclass(frozen=True)
class Check:
    """One need of one record: whether this machine meets it, and what to do if not."""

    need: str
    met: bool
    remedy: str


def main() -> None:
    """Print what this machine is, the table, and what to do."""
    names = sorted(file.stem for file in Path("records").glob("r[0-9]*.yaml"))
    files = {"params.yaml": Path("params.yaml")} | {name: Path(f"records/{name}.yaml") for name in names}
    params, faults = read_params(files)
    checks = {name: record_checks(found) for name, found in params.items()}
    parts = [machine_lines(), table(checks) if checks else [], remedies(checks, faults)]
    print("\n\n".join("\n".join(lines) for lines in parts if lines))


def read_params(files: dict[str, Path]) -> tuple[dict[str, Params], list[str]]:
    """The params of those files that are valid, by name, and one line for the fault of each other file."""
    found: dict[str, Params] = {}
    faults = []
    for name, file in files.items():
        try:
            found[name] = load_params(file)
        except UserError as error:
            faults.append(str(error))
    return found, faults


def machine_lines() -> list[str]:
    """The GPUs, the libraries, the memory and the attention of this machine, in three lines."""
    gpus = _gpus()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(len(gpus))})) or "none"
    rows, packed = (_attention(packed=packed) for packed in (False, True))
    return [
        f"GPUs       {len(gpus)}: {names}; driver {_driver()}, CUDA of PyTorch {torch.version.cuda or 'none'}",
        f"PyTorch    {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, "
        f"{_ram() / GIB:.0f} GiB of memory, {_disk() / 1e9:.0f} GB free here",
        f"Attention  {rows} for rows, {packed} for packed documents"
        + ("" if not gpus or packed == "flash4" else "; pip install flash-attn-4 makes training 3 to 16 % faster"),
    ]


def record_checks(params: Params) -> list[Check]:
    """All needs of a record, in the order of the table."""
    checks = [*_programs(params), *_sources(params), *_sizes(params)]
    return checks + (_gpu_checks(params) if _wants_gpus(params) else [])


def _wants_gpus(params: Params) -> bool:
    """Whether several processes mean GPUs: of those that are here each takes one; nobody compiles for a CPU."""
    return params.processes > 1 and (bool(_gpus()) or params.train.compile)


def _programs(params: Params) -> list[Check]:
    checks = [
        Check("packages as pinned", not _unpinned(), f"pip install -r {_pin_files()[-1]} ({_unpinned()})"),
        Check("torchrun", find_spec("torch.distributed.run") is not None, "install a PyTorch with torch.distributed"),
        Check("dvc", shutil.which("dvc") is not None, "source .venv/bin/activate, or pip install -r requirements.txt"),
        Check("git", shutil.which("git") is not None, "install git: experiments are kept in it"),
    ]
    if params.compress.codec == "lrzip":
        remedy = "apt-get install lrzip, or set compress.codec to ans, which packs smaller"
        checks.append(Check("lrzip", shutil.which("lrzip") is not None, remedy))
    return checks


def _sources(params: Params) -> list[Check]:
    fetch = params.fetch
    if isinstance(fetch, FetchHub):
        remedy = f"let this machine reach {fetch.endpoint}, set fetch.endpoint to a mirror, or copy a full cache here"
        return [Check("hub reachable", _answers(fetch.endpoint), remedy)]
    if isinstance(fetch, FetchSdists):
        remedy = "let pip reach an index, or set fetch.source to file"
        return [Check("package index reachable", all(_pip_knows(sdist.name) for sdist in fetch.sdists), remedy)]
    return [Check("document file", Path(fetch.path).is_file(), f"put the documents at {fetch.path} (fetch.path)")]


def _sizes(params: Params) -> list[Check]:
    on_gpus = _wants_gpus(params)
    ram = params.processes * (GPU_PROCESS_RAM if on_gpus else CPU_PROCESS_RAM)
    shards = params.fetch.train_shards + 1 if isinstance(params.fetch, FetchHub) else 0
    disk = COPIES * shards * SHARD_BYTES + len(params.seeds) * (SEED_BYTES if on_gpus else SEED_BYTES // 20)
    return [
        Check("memory", _ram() >= ram, f"{ram / GIB:.0f} GiB are needed, {_ram() / GIB:.0f} are here"),
        Check("disk", _disk() >= disk, f"{disk / 1e9:.0f} GB are needed on this disk, {_disk() / 1e9:.0f} are free"),
    ]


def _gpu_checks(params: Params) -> list[Check]:
    gpus, memory = _gpus(), GPU_MEMORY_LOOPED if params.model.loop else GPU_MEMORY
    return [
        Check(f"{params.processes} GPUs", len(gpus) >= params.processes, fewer_processes(params, len(gpus))),
        Check(
            "GPU memory",
            bool(gpus) and min(gpus) >= memory,
            f"{memory / GIB:.0f} GiB on each; a smaller train.micro_batch_tokens needs less, but changes the batches",
        ),
        Check("fast attention", _attention(packed=False) != "plain", "a CUDA GPU and a PyTorch built for it"),
    ]


def fewer_processes(params: Params, gpus: int) -> str:
    """What to set where there are only so many GPUs: as many processes as divide a step, and as long as that takes."""
    train = params.train
    micro_batches = train.batch_tokens // train.micro_batch_tokens
    few = max(n for n in range(1, max(gpus, 1) + 1) if micro_batches % n == 0)
    remedy = f"{gpus} are here; on {few}, processes: {few}"
    if train.max_wallclock_s is None:
        return f"{remedy} takes as many steps"
    longer = (train.max_wallclock_s - train.reserve_s) * params.processes / few + train.reserve_s
    return f"{remedy} and train.max_wallclock_s: {longer:.1f} give as many steps"


def _attention(*, packed: bool) -> str:
    """What attends in the records here (model/backends.py)."""
    return attention_backend(torch.device("cuda" if _gpus() else "cpu"), torch.bfloat16, length=2048, packed=packed)


def table(checks: dict[str, list[Check]]) -> list[str]:
    """Lines of needs by records; a variant that needs what its record needs has no column of its own."""
    records = {name: name.partition("-")[0] for name in checks}
    marked = {name: {check.need: check.met for check in found} for name, found in checks.items()}
    columns = [name for name, record in records.items() if name == record or marked[name] != marked[record]]
    needs = list(dict.fromkeys(check.need for found in checks.values() for check in found))
    width = max(map(len, needs))
    lines = [f"{'':{width}}  " + "  ".join(columns)]
    for need in needs:
        marks = (_mark(checks[name], need).center(len(name)) for name in columns)
        lines.append(f"{need:{width}}  " + "  ".join(marks).rstrip())
    return lines + [f"{name}: as {records[name]}" for name in checks if name not in columns]


def _mark(found: list[Check], need: str) -> str:
    marks = ["✓" if check.met else "✗" for check in found if check.need == need]
    return marks[0] if marks else "·"


def remedies(checks: dict[str, list[Check]], faults: Sequence[str] = ()) -> list[str]:
    """A line for each fault of a params file, and one for each unmet need with the records that have it."""
    unmet: dict[Check, list[str]] = {}
    for name, found in checks.items():
        for check in found:
            if not check.met:
                unmet.setdefault(check, []).append(name)
    lines = [f"✗ {fault}" for fault in faults]
    lines += [f"✗ {check.need} ({_some(names)}): {check.remedy}" for check, names in unmet.items()]
    return lines or ["Nothing is missing."]


def _some(names: list[str]) -> str:
    """The names as a list in words, without the variants of a record that is itself among them."""
    return ", ".join(name for name in names if name == name.partition("-")[0] or name.partition("-")[0] not in names)


def _gpus() -> list[int]:
    """Bytes of memory of every GPU."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disk() -> int:
    return shutil.disk_usage(".").free


@cache
def _pin_files() -> list[str]:
    """The files that pin packages for this machine; what a later one pins counts."""
    return ["requirements.txt", *(["requirements-gpu.txt"] if _gpus() else [])]


def _unpinned() -> str:
    """Packages whose installed version is another than the pinned one; "" if there is none."""
    lines = [line for file in _pin_files() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return ", ".join(f"{name}: {_installed(name)}" for name, wanted in pins.items() if _installed(name) != wanted)


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "missing"


@cache
def _answers(url: str) -> bool:
    """Whether a server says anything at all, an error included."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@cache
def _pip_knows(name: str) -> bool:
    """Whether pip, as it is configured here, finds the package."""
    options = ["--timeout", str(PATIENCE_S), "--retries", "0", "--disable-pip-version-check"]
    try:
        command = [sys.executable, "-m", "pip", "index", "versions", *options, name]
        return subprocess.run(command, capture_output=True, timeout=4 * PATIENCE_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return lines[0] if lines else "none"


if __name__ == "__main__":
    run_stage(main)
