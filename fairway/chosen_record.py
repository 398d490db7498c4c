"""A record of records/ for so many GPUs: its params file, and what it is expected to give and to cost.

A record is a run of eight processes in the track's minutes. On fewer GPUs there are fewer processes, and as many steps
take as many times longer: the clock and what is reserved of it are multiplied. So are the minutes to expect, but only
those that the processes share; stages of one process take as long as ever. A file for one process, such as the lab,
keeps its seconds on any number of GPUs, and has as many times more tokens in a step and training shards.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from fairway.params import Params, load_params
from fairway.reporting.comparison import load_published
from fairway.runtime.errors import UserError
from fairway.tokens.hub import FetchHub
from fairway.training.schedule import TrainSettings


@dataclass(frozen=True)
class Minutes:
    """Minutes for all seeds of a record, on as many GPUs as its file has processes.

    `shared` are those that all processes work in: training, adaptation and evaluation. In the others each process does
    the same, as in compilation, or a single one works, as in quantization, and fewer GPUs do not make them more.
    """

    total: int
    shared: int

    def on(self, longer: float) -> float:
        """Minutes where what the processes share takes so many times longer."""
        return self.shared * longer + self.total - self.shared


# The table of docs/reproduce.md, and below it the lab. Shared are the clock of training less its reserve, and what
# benchmarks/RESULTS.md projects or measures for adaptation and every evaluator, for each of the seeds.
MINUTES = {
    "r1150": Minutes(50, shared=38),
    "r1172": Minutes(50, shared=34),
    "r1488": Minutes(55, shared=38),
    "r1958": Minutes(65, shared=49),
    "r1150-causal-slot": Minutes(50, shared=38),
    "r1172-causal-slot": Minutes(50, shared=34),
    "r1488-causal-slot": Minutes(50, shared=33),
    "r1488-train-ttt": Minutes(50, shared=28),
    "r1958-train-ttt": Minutes(60, shared=37),
    "r1958-lora-ttt": Minutes(70, shared=49),
    "fairway": Minutes(80, shared=55),
    "lab-1gpu": Minutes(20, shared=8),
}
# Dollars for an hour of one GPU, as docs/reproduce.md reckons.
GPU_HOUR = 2.50


@dataclass(frozen=True)
class Chosen:
    """The record `name` for so many GPUs: the text of its params file, and what that says."""

    name: str
    gpus: int
    text: str
    params: Params
    # How many times longer than with the processes of the record it takes, where they share the work.
    longer: float


def record_names(records: Path) -> list[str]:
    """The records that there are, in alphabetical order."""
    return sorted(file.stem for file in records.glob("*.yaml") if file.stem != "published")


def choose(records: Path, name: str, gpus: int) -> Chosen:
    """The record of that name. Raises UserError if there is none, or if so many processes cannot share a step."""
    if name not in (names := record_names(records)):
        raise UserError(f"RECORD={name}: no such record; expected one of {', '.join(names)}")
    file = records / f"{name}.yaml"
    params = load_params(file)
    larger = max(gpus, 1) if params.processes == 1 else 1
    batch_tokens = params.train.batch_tokens * larger
    micro_batches = batch_tokens // params.train.micro_batch_tokens
    if gpus < 1 or micro_batches % gpus:
        able = ", ".join(str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0)
        raise UserError(f"GPUS={gpus}: expected a number that divides the {micro_batches} micro-batches: {able}")
    longer = max(params.processes / gpus, 1.0)
    text = _with(file.read_text(encoding="utf-8"), "processes", str(gpus), file)
    text = _with(text, "batch_tokens", str(batch_tokens), file)
    if isinstance(params.fetch, FetchHub):
        text = _with(text, "train_shards", str(params.fetch.train_shards * larger), file)
    for key, seconds in (("max_wallclock_s", params.train.max_wallclock_s), ("reserve_s", params.train.reserve_s)):
        if seconds is not None:
            text = _with(text, key, f"{seconds * longer:.1f}", file)
    with TemporaryDirectory() as folder:
        made = Path(folder) / "params.yaml"
        made.write_text(text, encoding="utf-8")
        return Chosen(name, gpus, text, load_params(made), longer)


def _with(text: str, key: str, value: str, file: Path) -> str:
    """The text of a params file with another value of a key that stands there once."""
    changed, count = re.subn(rf"^( *{key}:).*$", rf"\g<1> {value}", text, flags=re.MULTILINE)
    if count != 1:
        raise UserError(f"{file}: expected one line that begins with `{key}:`, found {count}")
    return changed


def record_of_one(records: Path, params: Params) -> str | None:
    """The record for one process that these params are, for as many GPUs as they have processes; None if there is none.

    It is known by what `choose` decides: its seconds, and its tokens of a step for each process. Whatever else was
    changed, these follow its rule.
    """
    for name, train in _records_of_one(records).items():
        ours, same = params.train, train.batch_tokens * params.processes == params.train.batch_tokens
        if same and (train.max_wallclock_s, train.reserve_s) == (ours.max_wallclock_s, ours.reserve_s):
            return name
    return None


@cache
def _records_of_one(records: Path) -> dict[str, TrainSettings]:
    """The training settings of all records for one process; a file that is damaged is none of them."""
    found = {}
    for name in record_names(records):
        with suppress(UserError):
            record = load_params(records / f"{name}.yaml")
            if record.processes == 1:
                found[name] = record.train
    return found


def expectation(chosen: Chosen, published: Path) -> str:
    """One line: the published score, minutes and cost. Raises UserError if the published figures are damaged."""
    gpus = "1 GPU" if chosen.gpus == 1 else f"{chosen.gpus} GPUs"
    line = f"{chosen.name} on {gpus}: {_score(chosen, published)}; "
    if chosen.name not in MINUTES:
        return line + "minutes and cost are not known"
    minutes = MINUTES[chosen.name].on(chosen.longer)
    return line + (
        f"some {minutes:,.0f} minutes, ${minutes / 60 * chosen.gpus * GPU_HOUR:,.0f} at ${GPU_HOUR:.2f} a GPU-hour, "
        "without certificates and the first download"
    )


def _score(chosen: Chosen, published: Path) -> str:
    """What a score is expected to be near, or why there is none to expect."""
    name, known = chosen.name, load_published(published).records
    if name in known:
        scores = known[name].bpb(known[name].evaluator)
        return f"published {mean(scores):.4f} bits per byte ({known[name].evaluator}, mean of {len(scores)} seeds)"
    origin = name.partition("-")[0]
    if origin in known:
        scores = known[origin].bpb(known[origin].evaluator)
        return f"no published score, being a variant of {origin} ({mean(scores):.4f} bits per byte)"
    if chosen.params.tokenize.val_limit_documents:
        return "no published score, since it scores a part of the validation documents"
    return "no published score, being a record of our own"
