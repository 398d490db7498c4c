"""Outputs appear whole or not at all, also when the process that writes them is killed."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from fairway.runtime.errors import UserError
from fairway.runtime.files import output_folder, read_array, require_file, write_atomic

WRITER = """
import sys, time
from pathlib import Path
from fairway.runtime.files import output_folder
with output_folder(Path(sys.argv[1])) as folder:
    (folder / "half.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_output_and_the_next_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as folder:
        (folder / "whole.bin").write_bytes(b"old")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, out], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert [path.name for path in out.iterdir()] == ["whole.bin"]
    with output_folder(out) as folder:
        (folder / "whole.bin").write_bytes(b"new")
    assert (out / "whole.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "half.bin").write_bytes(b"half")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "figures.json"
    write_atomic(path, "1")
    write_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]


# The system lets no file grow beyond so many bytes, as on a full disk.
FULL_DISK = """
import resource, sys
from pathlib import Path
from fairway.runtime.errors import run_stage
from fairway.runtime.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run_stage(lambda: {write})
"""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            "write_atomic(Path('out/x.bin'), bytes(2000))",
            "error: out/x.bin: 2000 bytes cannot be written: File too large",
        ),
        ("Path('plain.bin').write_bytes(bytes(2000))", "error: .+: File too large"),
    ],
)
def test_a_full_disk_is_told_in_one_line(write: str, message: str, tmp_path: Path) -> None:
    """And what was there before stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.bin").write_text("old")
    command = [sys.executable, "-c", FULL_DISK.format(write=write)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(message + "\n", done.stderr), done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.bin"]
    assert (tmp_path / "out/x.bin").read_text() == "old"


# More than a pipe holds.
CHATTER = """
from fairway.runtime.errors import run_stage
run_stage(lambda: [print("word", flush=True) for _ in range(100_000)])
"""


def test_output_that_is_not_read_to_its_end_leaves_no_traceback() -> None:
    """As in `make doctor | head`."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(CHATTER)} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("word\n", "error: the reader of the output has left\n")


def test_an_error_about_a_file_in_the_making_names_it_where_it_was_to_be(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"/out/x\.bin: no such file; `make x` makes it"),
        output_folder(tmp_path / "out") as folder,
    ):
        require_file(folder / "x.bin", "make x")


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.bin: no such file; `make x` makes it"):
        require_file(tmp_path / "x.bin", "make x")


@pytest.mark.parametrize("kept", [0, 3, 40, -5, -100])
def test_a_damaged_array_is_told_in_one_line(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "nats.npz"
    np.savez(path, nats=np.arange(50.0))
    assert read_array(path, "nats", "evaluate").tolist() == list(range(50))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"nats\.npz: not an \.npz file with an array 'nats'; run `evaluate` again$"):
        read_array(path, "nats", "evaluate")


def test_an_array_of_another_name_is_told_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "nats.npz", losses=np.arange(50.0))
    with pytest.raises(UserError, match=r"not an \.npz file with an array 'nats'"):
        read_array(tmp_path / "nats.npz", "nats", "evaluate")
