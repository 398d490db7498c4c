"""What this machine has and lacks for each record: a table of needs by records, and a line for what is missing.

Reads:  params.yaml (the experiment in hand), records/*.yaml but published.yaml
Prints: this machine's GPUs, memory and libraries, then ✓ or ✗ for each need and record, then what to do about each ✗.
        A params file with a fault is one line among these and has no column. On GPUs, how long a training step takes
        on each beside what was measured. At the end, what this machine can run. The exit status is 0 whatever is found.
Method: fairway/preflight.py, which also checks params.yaml before fetch and train; fairway/machine.py and step_time.py
Usage:  make doctor, or python -m stages.doctor
        python -m stages.doctor --step RECORD GPU     the line of one GPU, by a process that sees no other; the first
                                                      command starts this one for each GPU
"""

import os
import subprocess
import sys
from pathlib import Path

from fairway.chosen_record import record_names
from fairway.machine import description, gpu_bytes, visible_device
from fairway.params import Params, load_params
from fairway.preflight import GPU_MEMORY, RECORDS, record_checks, remedies, table, verdict
from fairway.runtime.errors import UserError, run_stage
from fairway.step_time import MEASURED_MS, step_verdict

# The record whose step is timed if params.yaml names none that has been measured.
TIMED = "r1172"


def main() -> None:
    """Print what this machine is, the table, and what to do; or the line of one GPU."""
    match sys.argv[1:]:
        case []:
            print_table()
        case ["--step", record, gpu] if record in MEASURED_MS and gpu.isdecimal():
            print(step_verdict(record, int(gpu)))
        case found:
            known = ", ".join(MEASURED_MS)
            raise UserError(
                f"usage: python -m stages.doctor, or with --step <one of {known}> <GPU>; found: {' '.join(found)}"
            )


def print_table() -> None:
    """Print what this machine is, the table, and what to do."""
    names = record_names(RECORDS)
    files = {"params.yaml": Path("params.yaml")} | {name: RECORDS / f"{name}.yaml" for name in names}
    params, faults = read_params(files)
    checks = {name: record_checks(found) for name, found in params.items()}
    parts = [description(), table(checks) if checks else [], remedies(checks, faults)]
    print("\n\n".join("\n".join(lines) for lines in parts if lines), flush=True)
    for lines in (speed(params), verdict(checks)):
        print("".join(f"\n{line}" for line in lines), end="\n" if lines else "", flush=True)


def speed(params: dict[str, Params]) -> list[str]:
    """A line on the speed of each GPU, where a record fits on the first: by the record of params.yaml.

    All are timed, since one that is too hot has been met beside one that was not: at the same time, each by a process
    of its own, because most of the minute or so that it takes is compilation, which holds for one GPU alone.
    """
    gpus = gpu_bytes()
    if not gpus or gpus[0] < GPU_MEMORY:
        return []
    chosen = params["params.yaml"].report.record if "params.yaml" in params else None
    command = [sys.executable, "-m", "stages.doctor", "--step", chosen if chosen in MEASURED_MS else TIMED]
    started = [
        subprocess.Popen(
            [*command, str(gpu)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible_device(gpu)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for gpu in range(len(gpus))
    ]
    said = [process.communicate()[0].strip() for process in started]
    return [line or f"✗ the process that times GPU {gpu} ended without a word" for gpu, line in enumerate(said)]


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


if __name__ == "__main__":
    run_stage(main)
