"""The tests' own `python` does what Python does: what a command line prints, reads and returns."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_python import warm_environment, warm_python

CODE = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sys.stdin.read(), __name__)
print("torch" in sys.modules, "fairway.params" in sys.modules, sys.path[0], file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["module", "file", "isolated file"])
def test_a_command_line_finds_its_arguments_folder_variables_and_input(kind: str, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(CODE)
    line = {"module": "-m shown", "file": "shown.py", "isolated file": "-I shown.py"}[kind]
    command = f"echo input | python {line} 'a b'"
    environment = warm_environment() | {"GIVEN": "given"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"['a b'] {tmp_path} given input\n __main__\n"
    assert done.stderr.startswith("True False ")
    assert done.stderr.endswith(f" {tmp_path}\n") is (kind != "isolated file")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [("pass", 0, ""), ("exit(7)", 7, ""), ("exit('no')", 1, "no\n"), ("import os; os.abort()", 1, "")],
)
def test_it_ends_as_its_code_does(code: str, status: int, said: str) -> None:
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_its_code_ends_when_it_is_killed() -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    started = subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    with started:
        pid = int(started.stdout.readline())
        started.kill()
    give_up_at = time.monotonic() + 10
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
