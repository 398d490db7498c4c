"""What an experiment needs, looked at before it costs anything.

Downloads and training are what costs, so a fault that only shows after them costs most. `check_machine` looks at GPUs,
memory, disk and programs before anything is fetched. `check_training` looks at these again, and at everything else that
a training run and the stages after it need; what takes no time comes first. Both stop at the first fault. `make doctor`
asks the same of the machine for every record: `record_checks` lists all needs of a params file, and `table` and
`remedies` write down which of them this machine meets, and what to do about the others.
"""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from fairway import machine
from fairway.chosen_record import record_of_one
from fairway.codec.byte_codecs import LRZIP_REMEDY, lrzip_program
from fairway.machine import GIB
from fairway.model.gpt import GPT
from fairway.params import Params
from fairway.reporting.comparison import load_published, named_record
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError
from fairway.runtime.resume import only_run
from fairway.tokens.hub import FetchHub
from fairway.tokens.sdists import FetchSdists
from fairway.tokens.validation import load_validation, verify_tokens
from fairway.training.training_files import train_stream

RECORDS = Path("records")


def check_training(params: Params, seed: int, tokens: Path, resume: Path) -> None:
    """Check that a seed can be trained on the folder `tokens`, and that the stages after it will find what they need.

    `resume` is the folder of the run's resume points, which no other run may be using. Raises UserError at the first
    fault. Reads and hashes every shard in the end: seconds on the 16 GB of a record.
    """
    if seed not in params.seeds:
        raise UserError(f"params.yaml: seeds: {seed} is not one of {params.seeds}")
    check_machine(params, fetched=True)
    with only_run(resume):
        pass
    check_tokens(params, tokens)


def check_machine(params: Params, *, fetched: bool) -> None:
    """Raise UserError at the first thing that a run needs of this machine and does not find.

    `fetched` says whether the disk already holds the documents or shards.
    """
    gpus, sizes = _machine_checks(params, fetched=fetched)
    for check in [*gpus, *sizes]:
        if check.key and not check.met:
            raise UserError(f"params.yaml: {check.key}: expected {check.need}: {check.remedy} (see make doctor)")
    check_later_stages(params)


def check_later_stages(params: Params) -> None:
    """Raise UserError if there is not the text that quantize reads, the program that compress starts, or a record that
    the report is to name."""
    gptq = params.quantize.gptq
    if gptq and gptq.path and not Path(gptq.path).is_file():
        raise UserError(f"params.yaml: quantize.gptq.path: {gptq.path}: no such file; expected UTF-8 text")
    if params.compress.codec == "lrzip":
        lrzip_program()
    named = {key: name for key, name in params.report if name is not None}
    if named:
        published = load_published(RECORDS / "published.yaml")
        for key, name in named.items():
            named_record(published, key, name)


def check_tokens(params: Params, tokens: Path) -> None:
    """Raise UserError unless the shards in `tokens` are sound, fit the model, and suffice for a step."""
    verify_tokens(tokens, vocab_size=params.model.vocab_size)
    load_validation(tokens, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    train_stream(params.model, params.train, tokens, alone(torch.device("cpu"))).next_batch()


# The memory of the host that one process needs: if it trains on a GPU, with its compilers, or if it runs the laptop
# default on a CPU.
GPU_PROCESS_RAM, CPU_PROCESS_RAM = 4 * GIB, 2 * GIB
# The memory of a GPU that trains micro-batches of so many tokens, with some room: benchmarks/RESULTS.md has 17 to 18
# GiB, and 32 GiB for a network that repeats layers.
GPU_MEMORY, GPU_MEMORY_LOOPED, GPU_MEMORY_TOKENS = 22 * GIB, 38 * GIB, 98_304
# Operations a second of one CPU core in training, by the laptop default, which takes 270 s on two. What trains on a
# CPU for more than so many hours is meant for GPUs.
CORE_FLOPS, CPU_HOURS = 2e10, 24
# Disk space. A shard lies in the hub's cache, in data/docs, in artifacts/tokens and in DVC's cache, each of them a copy
# if the file system knows no links. A seed of a record leaves its weights.
COPIES, SHARD_BYTES, SEED_BYTES = 4, 2 * 10**8, 2 * 10**9

# The one need without which figures may differ in their last digits, but everything runs.
PINNED = "packages as pinned"


@dataclass(frozen=True)
class Check:
    """One need of one record: whether this machine meets it, and what to do if it does not.

    `key` of params.yaml asks for it; a run begins without it where none does.
    """

    need: str
    met: bool
    remedy: str
    key: str = ""


def record_checks(params: Params) -> list[Check]:
    """All needs of a record, in the order of the table."""
    gpus, sizes = _machine_checks(params, fetched=False)
    return [*_programs(params), *_sources(params), *sizes, *gpus]


def _machine_checks(params: Params, *, fetched: bool) -> tuple[list[Check], list[Check]]:
    """What a run needs of GPUs, which is nothing where it takes none, and what it needs of memory and disk."""
    on_gpus = _wants_gpus(params)
    return _gpu_checks(params) if on_gpus else [], _sizes(params, on_gpus=on_gpus, fetched=fetched)


def cpu_hours(params: Params) -> float:
    """About how long this machine's CPU would train for all of train.max_steps.

    A token takes six operations for each parameter, forward and backward; attention is left out.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT(params.model).parameters())
    operations = 6 * parameters * params.train.batch_tokens * params.train.max_steps
    return operations / (machine.cores() * CORE_FLOPS) / 3600


def _wants_gpus(params: Params) -> bool:
    """Whether a run takes GPUs: several processes take one each where there are any, and a CPU may be too slow."""
    return (params.processes > 1 and len(machine.gpu_bytes()) > 0) or cpu_hours(params) > CPU_HOURS


def _programs(params: Params) -> list[Check]:
    unpinned = machine.unpinned()
    checks = [
        Check(PINNED, not unpinned, f"pip install -r {machine.pin_files()[-1]} ({unpinned})"),
        Check("torchrun", find_spec("torch.distributed.run") is not None, "install a PyTorch with torch.distributed"),
        Check("dvc", shutil.which("dvc") is not None, "source .venv/bin/activate, or pip install -r requirements.txt"),
        Check("git", shutil.which("git") is not None, "install git: experiments are kept in it"),
    ]
    if params.compress.codec == "lrzip":
        checks.append(Check("lrzip", shutil.which("lrzip") is not None, LRZIP_REMEDY))
    return checks


def _sources(params: Params) -> list[Check]:
    fetch = params.fetch
    if isinstance(fetch, FetchHub):
        remedy = f"let this machine reach {fetch.endpoint}, set fetch.endpoint to a mirror, or copy a full cache here"
        return [Check("hub reachable", machine.answers(fetch.endpoint), remedy)]
    if isinstance(fetch, FetchSdists):
        remedy = "let pip reach an index, or set fetch.source to file"
        return [Check("package index reachable", all(machine.pip_finds(sdist.name) for sdist in fetch.sdists), remedy)]
    there = all(Path(path).exists() for path in fetch.path)
    return [Check("documents", there, f"put the documents at {', '.join(fetch.path)} (fetch.path)")]


def _sizes(params: Params, *, on_gpus: bool, fetched: bool) -> list[Check]:
    ram = params.processes * (GPU_PROCESS_RAM if on_gpus else CPU_PROCESS_RAM)
    shards = params.fetch.train_shards + 1 if isinstance(params.fetch, FetchHub) and not fetched else 0
    disk = COPIES * shards * SHARD_BYTES + len(params.seeds) * (SEED_BYTES if on_gpus else SEED_BYTES // 20)
    ram_here, disk_here = machine.ram_bytes(), machine.free_disk_bytes()
    of_ram = f"{ram / GIB:.0f} GiB are needed, {ram_here / GIB:.0f} are here"
    of_disk = f"{disk / 1e9:.0f} GB are needed on this disk, {disk_here / 1e9:.0f} are free"
    return [
        Check("memory", ram_here >= ram, of_ram, "processes"),
        Check("disk", disk_here >= disk, of_disk, "fetch.train_shards" if shards else "seeds"),
    ]


def _gpus(params: Params) -> str:
    return "1 GPU" if params.processes == 1 else f"{params.processes} GPUs"


def _gpu_checks(params: Params) -> list[Check]:
    """The needs of a run on GPUs."""
    gpus, memory = machine.gpu_bytes(), GPU_MEMORY_LOOPED if params.model.loop else GPU_MEMORY
    memory = memory * params.train.micro_batch_tokens // GPU_MEMORY_TOKENS
    smaller = f"{memory / GIB:.0f} GiB on each; a smaller train.micro_batch_tokens needs less, but changes the batches"
    return [
        Check(_gpus(params), len(gpus) >= params.processes, _gpu_remedy(params, len(gpus)), "processes"),
        Check("GPU memory", bool(gpus) and min(gpus) >= memory, smaller, "train.micro_batch_tokens"),
        Check("fast attention", machine.attention(packed=False) != "plain", "a CUDA GPU and a PyTorch built for it"),
    ]


def _gpu_remedy(params: Params, gpus: int) -> str:
    """What to set if there are only so many GPUs, too few."""
    if gpus:
        other = "" if record_of_one(RECORDS, params) else ", or take records/lab-1gpu.yaml, for one GPU"
        return f"this machine has {gpus}; {fewer_processes(params, gpus)}{other}"
    # Rounded to one digit, since no more of it is known.
    hours = float(f"{cpu_hours(params):.0e}")
    smaller = "" if params.processes == 1 else "records/lab-1gpu.yaml is for one GPU (processes: 1), and "
    return (
        f"this machine has none, and its {machine.cores()} CPU cores would train for some {hours:,.0f} hours; "
        f"{smaller}the laptop default is for a CPU"
    )


def fewer_processes(params: Params, gpus: int) -> str:
    """How to run on so many GPUs: as many processes as divide a step, and the time that as many steps then take.

    A record for one process keeps its seconds on any number of GPUs, and its steps become smaller instead.
    """
    train = params.train
    if record := record_of_one(RECORDS, params):
        return (
            f"processes: {gpus} and train.batch_tokens: {train.batch_tokens // params.processes * gpus} keep its "
            f"seconds, as make record RECORD={record} GPUS={gpus} sets them"
        )
    micro_batches = train.batch_tokens // train.micro_batch_tokens
    few = max(n for n in range(1, gpus + 1) if micro_batches % n == 0)
    if train.max_wallclock_s is None:
        return f"processes: {few} takes as many steps"
    longer = (train.max_wallclock_s - train.reserve_s) * params.processes / few + train.reserve_s
    return f"processes: {few} and train.max_wallclock_s: {longer:.1f} give as many steps"


def table(checks: dict[str, list[Check]]) -> list[str]:
    """Lines of needs by records. A variant whose needs are met as those of its record has no column of its own."""
    records = {name: _record(name, checks) for name in checks}
    marked = {name: {check.need: check.met for check in found} for name, found in checks.items()}
    columns = [name for name, record in records.items() if name == record or marked[name] != marked[record]]
    needs = list(dict.fromkeys(check.need for found in checks.values() for check in found))
    width = max(map(len, needs))
    lines = [f"{'':{width}}  " + "  ".join(columns)]
    for need in needs:
        marks = (_mark(checks[name], need).center(len(name)) for name in columns)
        lines.append(f"{need:{width}}  " + "  ".join(marks).rstrip())
    return lines + [f"{name}: as {records[name]}" for name in checks if name not in columns]


def _record(name: str, names: Collection[str]) -> str:
    """The record that a name is a variant of, by what stands before its hyphen, or the name itself."""
    record = name.partition("-")[0]
    return record if record in names else name


def _mark(found: list[Check], need: str) -> str:
    """✓ if a need is met, ✗ if it is not, and · for a record that does not have it."""
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


def verdict(checks: dict[str, list[Check]]) -> list[str]:
    """One line that names the params files whose needs are all met; none if there are no params files.

    Other versions of packages than the pinned ones give other last digits, and no more.
    """
    ready = [name for name, found in checks.items() if all(check.met or check.need == PINNED for check in found)]
    named = ", ".join(_called(name) for name in ready) or "none of these as it is"
    return [f"This machine can run: {named}"] if checks else []


def _called(name: str) -> str:
    return f"{name} (`make repro`)" if name == "params.yaml" else name


def _some(names: list[str]) -> str:
    """The names as a list in words, without the variants of a record that is itself among them."""
    return ", ".join(name for name in names if name == _record(name, names))
