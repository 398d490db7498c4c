"""The training of a published program and ours, at one time on two GPUs of one host, on the same tokens.

Reads:  params.yaml (a record with one seed, one process and a clock) and artifacts/tokens; the published train_gpt.py
        of PR #1150, #1172 or #1488, which stays outside of this repository
Writes: OUT/program.log and OUT/fairway.log, every line with its seconds since the start; what the stage train writes
Prints: seconds to the first step, milliseconds a step, steps, and bpb of the last weights and of their average
Method: the program has its own settings, with the clock, seed and tokens of params.yaml. It is ended when it has scored
        its average; what it does behind that is for benchmarks/side_by_side.py, which knows PR #1855's program.
Usage:  cp records/r1488.yaml params.yaml     (and set processes: 1, seeds, train.max_wallclock_s, train.reserve_s: 0)
        dvc repro tokenize
        python -m benchmarks.training_pair TRAIN_GPT_PY [--stub FOLDER] [--gpus 0 1]

`--stub`: as in benchmarks/side_by_side.py.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.side_by_side import (
    ARTIFACTS,
    Line,
    check_pair,
    logged_clock,
    pace_ms,
    read_log,
    shared_environment,
    started,
)
from fairway.machine import visible_device
from fairway.params import Params, load_params
from fairway.runtime.errors import run_stage

# A log line behind a step, with its number and the milliseconds of training so far.
STEP = re.compile(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms")
# The last line that is of interest: the score of the averaged weights.
AVERAGED = r"post_ema.* val_bpb:([\d.]+)"
# The first steps, in which the clock of the chip settles, do not count.
SETTLED = 5
Figures = dict[str, float | None]


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--stub", type=Path, help="a folder with a module flash_attn_interface")
    parser.add_argument("--gpus", type=int, nargs=2, default=(0, 1), help="that of the program, and ours")
    parser.add_argument("--out", type=Path, default=Path("artifacts/training_pair"))
    chosen = parser.parse_args()
    params = load_params("params.yaml")
    check_pair(params, chosen.program, chosen.gpus)
    both = trained(params, chosen.program, chosen.out.resolve(), stub=chosen.stub, gpus=chosen.gpus)
    print(table(*both))


def trained(
    params: Params, program: Path, out: Path, *, stub: Path | None, gpus: tuple[int, int]
) -> tuple[Figures, Figures]:
    """Train with both programs, at the same time; the figures of the published one, and ours."""
    seed = str(params.seeds[0])
    settings = {
        "VOCAB_SIZE": params.model.vocab_size,
        "GPTQ_RESERVE_MS": 1000 * params.train.reserve_s,
        "TRAIN_LOG_EVERY": 25,
        "VAL_LOSS_EVERY": 0,
    }
    told = shared_environment(params, out, settings, stub=stub, gpu=gpus[0])
    theirs = started([sys.executable, str(program.resolve())], out, "program", told, until=AVERAGED)
    own = {"CUDA_VISIBLE_DEVICES": visible_device(gpus[1])}
    ours = started([sys.executable, "-m", "stages.train", seed], out, "fairway", own, folder=Path.cwd())
    for wait in (theirs, ours):
        wait()
    return program_figures(read_log(out / "program.log")), own_figures(params, ARTIFACTS / "train" / seed)


def program_figures(log: list[Line]) -> Figures:
    """What such a program prints of its training. What a log has not got is None."""
    steps = [(at, int(match[1]), int(match[2]) / 1000) for at, text in log if (match := STEP.match(text))]

    def last(pattern: str) -> float | None:
        found = [float(match[1]) for _, text in log if (match := re.search(pattern, text))]
        return found[-1] if found else None

    return {
        "start_s": steps[0][0] - steps[0][2] if steps else None,
        "step_ms": pace_ms([(clock_s, step) for _, step, clock_s in steps if step >= SETTLED]),
        "steps": last(r"^stopping_early: .* step:\s*(\d+)/"),
        "last_bpb": last(r"^step:\d+/\d+ val_loss:\S+ val_bpb:([\d.]+)"),
        "ema_bpb": last(AVERAGED),
    }


def own_figures(params: Params, folder: Path) -> Figures:
    """The same figures of the stage train, from what it wrote to `folder`."""
    train = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    moments, _ = logged_clock(params, folder, train["wall_s"])
    return {
        "start_s": train["start_s"] + train["compile_s"],
        "step_ms": pace_ms([moment for moment in moments if moment[1] >= SETTLED]),
        "steps": train["steps"],
        "last_bpb": train["val_bpb_by_weights"]["last"],
        "ema_bpb": train["val_bpb_by_weights"][f"ema_{params.average.ema_decay}"],
    }


# Rows of the table: what a key means, the key, and its format.
ROWS = (
    ("start to the first step, s", "start_s", ".0f"),
    ("ms per step", "step_ms", ".1f"),
    ("steps", "steps", ".0f"),
    ("bpb of rows, last weights", "last_bpb", ".4f"),
    ("bpb of rows, EMA", "ema_bpb", ".4f"),
)


def table(theirs: Figures, ours: Figures) -> str:
    """Both columns in Markdown, and ours over theirs."""
    lines = ["| | published program | fairway | ratio |", "|---|---:|---:|---:|"]
    for name, key, form in ROWS:
        pair = [theirs[key], ours[key]]
        cells = ["not measured" if figure is None else format(figure, form) for figure in pair]
        known = [figure for figure in pair if figure]
        ratio = f"{known[1] / known[0]:.3f}" if len(known) == 2 else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main)
