"""A published program's training beside ours (benchmarks/training_pair.py), on a CPU, with a program made up here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Experiment

from benchmarks.training_pair import program_figures, table

# Prints what the programs print, from the variables that it is told, and then goes on for longer than a test waits.
PROGRAM = """
import os, time
from pathlib import Path

assert list(Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin")) and Path(os.environ["TOKENIZER_PATH"]).is_file()
for step in (1, 5, 10, 25):
    print(f"step:{step}/20000 train_loss:5.0 train_time:{600 * step}ms step_avg:600.00ms", flush=True)
print("step:25/20000 val_loss:4.0000 val_bpb:1.6000 train_time:15000ms step_avg:600.00ms")
print(f"stopping_early: wallclock_cap train_time:15000ms step:25/20000 seed {os.environ['SEED']}")
print("DIAGNOSTIC post_ema val_loss:3.9000 val_bpb:1.5900 eval_time:9ms", flush=True)
time.sleep(600)
"""
RUN = """
from pathlib import Path
from benchmarks.training_pair import table, trained
from fairway.params import load_params

params = load_params("params.yaml")
print(table(*trained(params, Path("program.py"), Path("out").resolve(), stub=None, gpus=(0, 1))))
"""


def test_both_train_and_the_program_is_ended_behind_its_average(tmp_path: Path, tokenized: Experiment) -> None:
    made = Experiment(shutil.copytree(tokenized.folder, tmp_path / "made"))
    made.set_params(made.params | {"train": made.params["train"] | {"max_wallclock_s": 600.0, "max_steps": 8}})
    (made.folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=made.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in done.stdout.splitlines()}
    assert rows["ms per step"][0] == "600.0"
    assert rows["steps"][:2] == ["25", "8"]
    assert rows["bpb of rows, last weights"][0] == "1.6000"
    assert rows["bpb of rows, EMA"][0] == "1.5900"
    assert float(rows["bpb of rows, EMA"][2]) == pytest.approx(float(rows["bpb of rows, EMA"][1]) / 1.59, abs=1e-3)


def test_a_log_that_ends_early_leaves_figures_out() -> None:
    figures = program_figures([(7.0, "step:1/20000 train_loss:6.9 train_time:500ms step_avg:500.00ms")])
    assert figures == {"start_s": 6.5, "step_ms": None, "steps": None, "last_bpb": None, "ema_bpb": None}
    assert "| steps | not measured | not measured |  |" in table(figures, figures)
