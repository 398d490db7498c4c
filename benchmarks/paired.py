"""Ours against PR #1855's program over several seeds, and whether the gap between them could be chance.

Reads:  benchmarks/side_by_side.json, which `python -m benchmarks.side_by_side` writes
Prints: for each GPU, PyTorch, kernels, record, settings and seconds of training a table of the pairs by seed, and below
        it for each score the mean gap over seeds (below zero: ours is better), its deviation, and two-sided p of
        Student's paired test
Usage:  python -m benchmarks.paired [RECORD]
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import ROWS, RUNS, Entry
from fairway.reporting.comparison import paired
from fairway.runtime.errors import UserError, run_stage

# What has to agree for pairs to stand in one table.
CONDITIONS = ("gpu", "torch", "attention", "record", "settings", "seconds")
# The scores that are tested, of the table's keys.
SCORES = ("last_bpb", "ema_bpb", "quantized_bpb", "final_bpb")


def main() -> None:
    """Print the tables of all records, or of one."""
    print(tables(_runs(RUNS), *sys.argv[1:2]))


def _runs(path: Path) -> list[Entry]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python -m benchmarks.side_by_side measure` makes it")
    runs: list[Entry] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def tables(runs: list[Entry], record: str | None = None) -> str:
    """The tables in Markdown. Of several pairs with one seed the last counts. Raises UserError if there is no pair."""
    pairs: dict[tuple[object, ...], dict[int, dict[str, Entry]]] = {}
    for run in runs:
        if run["pair"] is not None and record in (None, run["record"]):
            by_program = pairs.setdefault(tuple(run.get(key) for key in CONDITIONS), {}).setdefault(run["seed"], {})
            if any(other["pair"] != run["pair"] for other in by_program.values()):
                by_program.clear()
            by_program[run["program"]] = run
    found = [_table(conditions, by_seed) for conditions, by_seed in pairs.items() if all(map(_whole, by_seed.values()))]
    if not found:
        raise UserError(f"{RUNS}: no pair{f' of {record}' if record else ''} of both programs")
    return "\n\n".join(found)


def _whole(by_program: dict[str, Entry]) -> bool:
    return by_program.keys() == {"pr1855", "fairway"}


def _table(conditions: tuple[object, ...], by_seed: dict[int, dict[str, Entry]]) -> str:
    seeds = sorted(by_seed)
    gpu, torch, attention, record, settings, seconds = conditions
    head = f"{gpu}, PyTorch {torch}, {attention}, {record} (settings {settings or 'not noted'}), {seconds:.0f} s:"
    lines = [head, "", "| pr1855 / fairway | " + " | ".join(map(str, seeds)) + " |"]
    lines.append("|---|" + "---:|" * len(seeds))
    for name, key, form in ROWS:
        cells = (" / ".join(_shown(by_seed[seed][who][key], form) for who in ("pr1855", "fairway")) for seed in seeds)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(_gap(name, key, by_seed) for name, key, _ in ROWS if key in SCORES)])


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _gap(name: str, key: str, by_seed: dict[int, dict[str, Entry]]) -> str:
    """One line: the gap of a score over the seeds for which both programs have it."""
    both = [(pair["pr1855"][key], pair["fairway"][key]) for pair in by_seed.values()]
    theirs, ours = np.array([values for values in both if None not in values], dtype=float).reshape(-1, 2).T
    if not len(ours):
        return f"- {name}: no pair has both"
    # Every seed counts the same, whatever it scored.
    found = paired(theirs, ours, np.ones(len(ours)))
    line = f"- {name}: {found.gap_bpb:+.4f} over {len(ours)} pair{'s' if len(ours) > 1 else ''}"
    if found.error_bpb is None or found.p is None:
        return line
    return f"{line}, deviation {found.error_bpb * math.sqrt(len(ours)):.4f}, p {found.p:.2g}"


if __name__ == "__main__":
    run_stage(main)
