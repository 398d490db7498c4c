"""PR #1855's program and this pipeline on two GPUs of one host, at the same time, on the same tokens.

Reads:  params.yaml (records/lab-1gpu.yaml, or one with its keys: one seed, one process, a clock) and artifacts/tokens;
        the published train_gpt.py of PR #1855, which stays outside of this repository
Writes: OUT/conditions.json, OUT/pr1855.log and OUT/fairway.log, every line with its seconds since the start; adds a run
        of each program to benchmarks/side_by_side.json, which nothing else writes
Method: the program trains on one GPU with its own settings, but an average that remembers 50 steps, and the clock and
        seed of params.yaml.
        `dvc repro` runs on another, from training to the certificates. Each packs and evaluates what it has trained.
        The program prints what it measures; what it does not print is read off the times of its lines.
Usage:  dvc repro tokenize
        python -m benchmarks.side_by_side measure TRAIN_GPT_PY --attention "flash-attn-4 4.0.0b36" [--stub FOLDER]
            [--gpus 2 3]
        python -m benchmarks.side_by_side add [--unmeasured start_s total_s]
            the pair in OUT that was broken off: what it has come to, without figures of the program that other work
            disturbed
        python -m benchmarks.side_by_side table     the last pair of each GPU and record

The program imports flash_attn_interface (FlashAttention-3). `--stub` names a folder with a module of that name, which
hands its calls to the kernels that both are to be compared with. No pair has yet run to the end of the program: plan
for more than half an hour, since its start alone took up to 724 s.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fairway.machine import visible_device
from fairway.params import Params, load_params
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic

RUNS = Path("benchmarks/side_by_side.json")
ARTIFACTS = Path("artifacts")
# A line of a log, with the seconds since the program was started.
Line = tuple[float, str]
Entry = dict[str, Any]

# How PR #1855 was run (the command in its README), but for what params.yaml decides, and with three warm-up steps,
# which compile as much as its twenty. Its averages remember 50 steps: the published decay of 0.9965 remembers too much
# of a run of four hundred.
PUBLISHED_SETTINGS = {
    "VOCAB_SIZE": 8192, "CASEOPS_ENABLED": 1, "ITERATIONS": 20000, "TRAIN_LOG_EVERY": 25, "VAL_LOSS_EVERY": 0,
    "WARMUP_STEPS": 3, "EMA_DECAY": 0.98, "COMPRESSOR": "pergroup", "MATRIX_LR": 0.026, "MIN_LR": 0.1,
    "WARMDOWN_FRAC": 0.85,
    "BETA2": 0.99, "GRAD_CLIP_NORM": 0.3, "MUON_BACKEND_STEPS": 5, "FUSED_CE_ENABLED": 1, "SMEAR_GATE_ENABLED": 1,
    "SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.5, "GATE_WINDOW": 12, "GATED_ATTN_QUANT_GATE": 1,
    "EMBED_BITS": 7, "MLP_CLIP_SIGMAS": 11.5, "ATTN_CLIP_SIGMAS": 13.0, "EMBED_CLIP_SIGMAS": 14.0,
    "GPTQ_RESERVE_SECONDS": 0.5, "GPTQ_CALIBRATION_BATCHES": 16, "LQER_ENABLED": 1, "LQER_ASYM_ENABLED": 1,
    "LQER_RANK": 4, "LQER_FACTOR_BITS": 4, "LQER_ASYM_GROUP": 64, "LQER_TOP_K": 3, "PHASED_TTT_ENABLED": 1,
    "PHASED_TTT_NUM_PHASES": 3, "TTT_CHUNK_SIZE": 48, "TTT_BETA2": 0.99, "TTT_WEIGHT_DECAY": 0.5, "TTT_LORA_RANK": 80,
    "GLOBAL_TTT_MOMENTUM": 0.9,
}  # fmt: skip
# The share of the validation documents that are done when the last of its phases has been trained: 2,500 of 50,000.
PREFIX_SHARE = 0.05


def main() -> None:
    """Measure a pair and add it to the runs, or add one that was broken off, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("program", type=Path)
    measure.add_argument("--attention", required=True, help="the kernels that both run, with their version")
    measure.add_argument("--stub", type=Path, help="a folder with a module flash_attn_interface")
    measure.add_argument("--record", default="lab-1gpu")
    measure.add_argument("--gpus", type=int, nargs=2, default=(0, 1), help="that of the program, and ours")
    add = commands.add_parser("add")
    add.add_argument(
        "--unmeasured", nargs="+", default=[], metavar="KEY", help="figures of the program that do not count"
    )
    for command in (measure, add):
        command.add_argument("--out", type=Path, default=Path("artifacts/side_by_side"))
    commands.add_parser("table")
    chosen = parser.parse_args()
    if chosen.command == "table":
        print(table(_runs()))
        return
    params = load_params("params.yaml")
    if chosen.command == "measure":
        check_pair(params, chosen.program, chosen.gpus)
        _measure(params, chosen)
    entries = _entries(params, chosen.out)
    if chosen.command == "add":
        if unknown := set(chosen.unmeasured) - set(entries[0]):
            raise UserError(f"--unmeasured {' '.join(sorted(unknown))}: expected keys of {RUNS}, such as start_s")
        entries[0] |= dict.fromkeys(chosen.unmeasured)
    write_atomic(RUNS, json.dumps([*_runs(), *entries], indent=1) + "\n")
    print(table(entries))


def _runs() -> list[Entry]:
    runs: list[Entry] = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []
    return runs


def check_pair(params: Params, program: Path, gpus: Sequence[int]) -> None:
    """Raise UserError for what would fail after minutes."""
    if (there := torch.cuda.device_count()) <= max(gpus) or len(set(gpus)) < 2:
        raise UserError(f"--gpus {gpus[0]} {gpus[1]}: expected two of the {there} GPUs, counted from 0")
    if not program.is_file():
        raise UserError(f"{program}: no such file; expected a published train_gpt.py")
    if len(params.seeds) != 1 or params.processes != 1 or params.train.max_wallclock_s is None:
        raise UserError("params.yaml: seeds, processes, train.max_wallclock_s: expected one seed, 1, and seconds")
    if not (ARTIFACTS / "tokens/meta.json").is_file():
        raise UserError("artifacts/tokens/meta.json: no such file; `dvc repro tokenize` makes it")


def _measure(params: Params, chosen: argparse.Namespace) -> None:
    """Run both programs to their ends, with what they have in common in OUT/conditions.json."""
    out, now = chosen.out.resolve(), time.strftime("%Y-%m-%dT%H:%M:%S")
    out.mkdir(parents=True, exist_ok=True)
    conditions = {
        "date": now[:10],
        "pair": now,
        "gpu": torch.cuda.get_device_name(chosen.gpus[1]),
        "torch": torch.__version__,
        "attention": chosen.attention,
        "record": chosen.record,
        "seed": params.seeds[0],
        "seconds": params.train.max_wallclock_s,
    }
    write_atomic(out / "conditions.json", json.dumps(conditions, indent=1) + "\n")
    pr1855 = started([sys.executable, str(chosen.program.resolve())], out, "pr1855", _environment(params, chosen, out))
    own = {"CUDA_VISIBLE_DEVICES": visible_device(chosen.gpus[1])}
    fairway = started([sys.executable, "-m", "dvc", "repro"], out, "fairway", own, folder=Path.cwd())
    for wait in (pr1855, fairway):
        wait()


def _entries(params: Params, out: Path) -> list[Entry]:
    """A run of each program, from the logs in OUT and the artifacts here."""
    if not (out / "conditions.json").is_file():
        raise UserError(f"{out}/conditions.json: no such file; `python -m benchmarks.side_by_side measure` makes it")
    conditions = json.loads((out / "conditions.json").read_text(encoding="utf-8")) | {"settings": settings_name(params)}
    logs = [read_log(out / f"{name}.log") for name in ("pr1855", "fairway")]
    return [conditions | pr1855_entry(logs[0]), conditions | fairway_entry(params, logs[1], ARTIFACTS)]


def settings_name(params: Params) -> str:
    """A short name for all settings but seeds and where the text and its tokenizer come from.

    Pairs that share it can be averaged.
    """
    others = params.model_dump(
        mode="json", exclude={"seeds": True, "fetch": True, "tokenize": {"model"}, "report": True, "submission": True}
    )
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8]


def read_log(path: Path) -> list[Line]:
    """The lines of a log that `started` wrote."""
    lines = (line.lstrip().partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    return [(float(at), text) for at, _, text in lines]


def _environment(params: Params, chosen: argparse.Namespace, out: Path) -> dict[str, str]:
    """The variables by which the program is told its settings."""
    meta = json.loads((ARTIFACTS / "tokens/meta.json").read_text(encoding="utf-8"))
    prefix = {"PHASED_TTT_PREFIX_DOCS": round(PREFIX_SHARE * meta["val_documents"])}
    return shared_environment(params, out, PUBLISHED_SETTINGS | prefix, stub=chosen.stub, gpu=chosen.gpus[0])


def shared_environment(
    params: Params, out: Path, settings: dict[str, Any], *, stub: Path | None, gpu: int
) -> dict[str, str]:
    """A published program's own settings, and the variables by which it is told what it has in common with ours."""
    tokens = published_names(out)
    own = {
        "CUDA_VISIBLE_DEVICES": visible_device(gpu),
        "SEED": params.seeds[0],
        "MAX_WALLCLOCK_SECONDS": params.train.max_wallclock_s,
        "DATA_PATH": tokens,
        "TOKENIZER_PATH": tokens / "tokenizer.model",
        "TORCHINDUCTOR_CACHE_DIR": out / "inductor",
        "TRITON_CACHE_DIR": out / "triton",
        "PYTHONUNBUFFERED": 1,
    }
    paths = [str(stub.resolve())] if stub else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {name: str(value) for name, value in (settings | own).items()} | {"PYTHONPATH": ":".join(paths)}


def published_names(out: Path) -> Path:
    """A folder of links to the token files by the names that the program looks for."""
    folder = out / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (ARTIFACTS / "tokens").resolve().glob("*"):
        link = folder / (file.name if file.suffix == ".model" else f"fineweb_{file.name.removeprefix('fineweb_')}")
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return folder


def started(
    command: list[str],
    out: Path,
    name: str,
    environment: dict[str, str],
    *,
    folder: Path | None = None,
    until: str | None = None,
) -> Callable[[], None]:
    """Start a program, whose output goes to OUT/<name>.log; the function returned waits for its end.

    That raises UserError if the program failed. Once it has printed a line with the pattern `until` it is ended, which
    is no failure.
    """
    (where := folder or out / name).mkdir(parents=True, exist_ok=True)
    last, ended = "it printed nothing", False
    started_at = time.monotonic()
    process = subprocess.Popen(
        command, cwd=where, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def read() -> None:
        nonlocal last, ended
        assert process.stdout is not None
        with (out / f"{name}.log").open("w", encoding="utf-8") as log:
            for text in process.stdout:
                last = text.rstrip("\n")
                print(f"{time.monotonic() - started_at:9.3f} {last}", file=log, flush=True)
                if until and not ended and re.search(until, last):
                    ended = True
                    process.terminate()

    thread = threading.Thread(target=read)
    thread.start()

    def join() -> None:
        thread.join()
        if process.wait() and not ended:
            raise UserError(f"{out}/{name}.log: the program failed: {last}")

    return join


def pr1855_entry(log: list[Line]) -> Entry:
    """What PR #1855's program prints of itself. What a log has not got is None."""

    def figure(pattern: str, scale: float = 1.0) -> float | None:
        found = [match[1] for _, text in log if (match := re.search(pattern, text))]
        return float(found[-1]) * scale if found else None

    def moment(pattern: str) -> float | None:
        return next((at for at, text in log if re.search(pattern, text)), None)

    steps = [(at, int(match[1])) for at, text in log if (match := re.match(r"(\d+)/\d+ train_loss", text))]
    loop, hessians, packing = moment("^layer_loop:enabled"), moment("^GPTQ:collecting"), moment("^Serialize: per-group")
    plain, looped = _halves(steps, loop or math.inf)
    final = figure(r"quantized_ttt_phased .*val_bpb:([\d.]+)")
    return {
        "program": "pr1855",
        "steps": figure(r"^stopping_early: .* step: (\d+)/"),
        "step_ms": pace_ms(plain),
        "step_ms_looped": pace_ms(looped),
        "start_s": steps[0][0] if steps else None,
        "last_bpb": figure(r"^\d+/\d+ val_loss: .* val_bpb: ([\d.]+)"),
        "ema_bpb": figure(r"post-ema .*val_bpb:([\d.]+)"),
        "quantized_bpb": figure(r"^diagnostic quantized .*val_bpb:([\d.]+)"),
        "final_bpb": final,
        # Nobody has certified it.
        "legal": None,
        "artifact_bytes": figure(r"^Total submission size .*: (\d+) bytes"),
        "pack_s": figure(r"per-group compression done in ([\d.]+)s"),
        "unpack_s": figure(r"decompression done in ([\d.]+)s"),
        "gptq_s": packing - hessians if packing and hessians else None,
        "adaptive_eval_s": figure(r"quantized_ttt_phased .*eval_time:(\d+)ms", 1e-3),
        "peak_gib": figure(r"^peak memory allocated: (\d+) MiB", 1 / 1024),
        "total_s": log[-1][0] if final else None,
    }


def pace_ms(steps: list[tuple[float, int]]) -> float | None:
    """Milliseconds of a step between the first and the last of some moments, each with its number of steps."""
    if len(steps) < 2 or steps[-1][1] == steps[0][1]:
        return None
    return 1000 * (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1])


def _halves(steps: list[tuple[float, int]], loop_s: float) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """The moments before and after the loop began, without the first five steps, in which the clock settles."""
    settled = [moment for moment in steps if moment[1] >= 5]
    return [moment for moment in settled if moment[0] < loop_s], [moment for moment in settled if moment[0] >= loop_s]


def fairway_entry(params: Params, log: list[Line], artifacts: Path) -> Entry:
    """The same figures of a `dvc repro`, from what its stages wrote. What is not there is None."""
    seed = params.seeds[0]

    def report(name: str) -> dict[str, Any]:
        path = artifacts / name
        return defaultdict(lambda: None, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    train, quantize = report(f"train/{seed}/train.json"), report(f"quantize/{seed}/quantize.json")
    final = report(f"evaluate/{seed}/lora_ttt/metrics.json")
    plain, looped = _halves(*logged_clock(params, artifacts / f"train/{seed}", train["wall_s"]))
    by_weights = train["val_bpb_by_weights"] or {}
    return {
        "program": "fairway",
        "steps": train["steps"],
        "step_ms": pace_ms(plain),
        "step_ms_looped": pace_ms(looped),
        "start_s": _sum(train["start_s"], train["compile_s"]),
        "last_bpb": by_weights.get("last"),
        "ema_bpb": by_weights.get(f"ema_{params.average.ema_decay}"),
        "quantized_bpb": quantize["quantized_rows_bpb"],
        "final_bpb": final["val_bpb"],
        "legal": report(f"certify/{seed}/lora_ttt/certificate.json")["legal"],
        "artifact_bytes": report(f"size_check/{seed}/size.json")["total_bytes"],
        "pack_s": report(f"compress/{seed}/compress.json")["pack_s"],
        "unpack_s": final["load_s"],
        "gptq_s": _sum(quantize["calibration_s"], quantize["quantize_s"]),
        "adaptive_eval_s": _sum(final["eval_s"], final["load_s"] and -final["load_s"]),
        "peak_gib": train["peak_memory_bytes"] and train["peak_memory_bytes"] / 2**30,
        "total_s": log[-1][0] if log and final["val_bpb"] else None,
    }


def _sum(*parts: float | None) -> float | None:
    """The sum, or None if a part of it was not measured."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def logged_clock(params: Params, folder: Path, wall_s: float | None) -> tuple[list[tuple[float, int]], float]:
    """The logged moments of a training run, each with its number of steps, and the second in which the loop began."""
    path = folder / "live/plots/metrics/clock_s.tsv"
    curve = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    moments = [(float(clock_s), int(step)) for step, clock_s in (line.split("\t") for line in curve)]
    return moments, (wall_s or math.inf) * (params.train.schedule.loop_from or 1.0)


# Rows of the table: what a key means, the key, and its format.
ROWS = (
    ("process start to the first step, s", "start_s", ".0f"),
    ("ms per step", "step_ms", ".0f"),
    ("ms per step, looped", "step_ms_looped", ".0f"),
    ("steps", "steps", ".0f"),
    ("bpb of rows, last weights", "last_bpb", ".4f"),
    ("bpb of rows, EMA", "ema_bpb", ".4f"),
    ("bpb of rows, quantized", "quantized_bpb", ".4f"),
    ("bpb of LoRA TTT", "final_bpb", ".4f"),
    ("LoRA TTT, s", "adaptive_eval_s", ".1f"),
    ("GPTQ, s", "gptq_s", ".1f"),
    ("packing, s", "pack_s", ".1f"),
    ("unpacking, s", "unpack_s", ".1f"),
    ("bytes with code", "artifact_bytes", ",.0f"),
    ("peak memory in training, GiB", "peak_gib", ".1f"),
    ("start to the last figure, s", "total_s", ".0f"),
)


def table(runs: list[Entry]) -> str:
    """The last pair of each GPU and record in Markdown, with the conditions above it."""
    pairs: dict[tuple[str, str], dict[str, Entry]] = {}
    for run in runs:
        if run["pair"] is not None:
            pair = pairs.setdefault((run["gpu"], run["record"]), {})
            # Programs of an earlier pair go, so that one pair's figures stand side by side.
            pairs[run["gpu"], run["record"]] = {
                program: entry for program, entry in pair.items() if entry["pair"] == run["pair"]
            } | {run["program"]: run}
    return "\n\n".join(_pair_table(pair) for pair in pairs.values()) or "no pairs yet"


def _pair_table(pair: dict[str, Entry]) -> str:
    run = next(iter(pair.values()))
    head = (
        f"{run['date']}, {run['gpu']}, PyTorch {run['torch']}, {run['attention']}, {run['record']}, "
        f"{run['seconds']:.0f} s of training, seed {run['seed']}:"
    )
    lines = [head, "", f"| | {' | '.join(pair)} |", "|---|" + "---:|" * len(pair)]
    for name, key, form in ROWS:
        cells = ("not measured" if entry[key] is None else format(entry[key], form) for entry in pair.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main)
