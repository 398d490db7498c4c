"""A program or a package that the project does not bring is seen by no test that has not asked for it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from bare_machine import is_own

TESTS = """
import os, shutil, subprocess
import pytest

def test_plain():
    with pytest.raises(FileNotFoundError):
        subprocess.run(["outside"])
    assert subprocess.run(["sh", "-c", "command -v outside"]).returncode != 0

@pytest.fixture(scope="module")
def status():
    return subprocess.run(["outside"]).returncode

@pytest.mark.program("outside")
def test_marked(status):
    assert status == subprocess.run(["outside"]).returncode == 7
    assert shutil.which("another") is None

@pytest.mark.program("outside", "absent")
def test_skipped():
    raise AssertionError("not reached")
"""


def test_programs_outside_are_seen_by_tests_marked_as_needing_them_alone(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(TESTS)
    (tmp_path / "bin").mkdir()
    for name in ("outside", "another"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 7\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p", "bare_machine", "test_inner.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed, 1 skipped" in done.stdout, done.stdout
    assert "needs the program absent, which is not installed" in done.stdout


def test_subprocesses_import_from_nowhere_else() -> None:
    code = "import sys; print(*sys.path, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [folder for folder in done.stdout.split("\n") if Path(folder).exists() and not is_own(folder)] == []


def test_a_module_of_the_standard_library_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sitecustomize.py is on Debian, which keeps it in /etc; a package that is installed there may not."""
    library, elsewhere = tmp_path / "python3", tmp_path / "module.py"
    (library / "dist-packages").mkdir(parents=True)
    elsewhere.touch()
    for folder in (library, library / "dist-packages"):
        (folder / "module.py").symlink_to(elsewhere)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    assert is_own(str(library / "module.py"))
    assert not is_own(str(library / "dist-packages/module.py"))
    assert not is_own(str(library / "dist-packages"))
    assert not is_own(str(elsewhere))


def test_what_lies_elsewhere_is_not_the_projects_own(tmp_path: Path) -> None:
    assert is_own(os.__file__)
    assert is_own(str(Path(sys.prefix) / "lib/python3/site-packages/package.py"))
    assert not is_own(str(tmp_path / "package.py"))
    in_environment = sys.prefix == sys.base_prefix
    assert is_own(str(Path(os.__file__).parent / "site-packages/package.py")) is in_environment
