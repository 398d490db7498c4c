"""Every test runs as on a machine that has Python, git, a shell and coreutils, and nothing else.

Otherwise a test that leans on a program of its author's machine is green there and red in a fresh container. A pytest
plugin, which conftest.py loads. A test that does need another program says so: `@pytest.mark.program("lrzip")` shows it
that program, or skips it with the program's name where it is not installed.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

COREUTILS = (
    "basename cat chmod cp cut date dirname echo env expr false head id ln ls mkdir mktemp mv nproc pwd readlink "
    "realpath rm rmdir seq sleep sort stat tail tee test touch tr true uname uniq wc"
)
PROGRAMS = ("git", "sh", "bash", *COREUTILS.split())
# What Triton and torch.compile build their kernels' launchers with; gcc calls the other two by name.
COMPILER = ("gcc", "g++", "as", "ld")
# What chromedriver starts on Debian is a script, which calls the last two.
BROWSER = ("chromedriver", "chromium", "grep", "find")
# Programs that come with a marker of pyproject.toml, so that its tests need not name them again.
NEEDED_BY_MARKER = {"gpu": COMPILER, "browser": BROWSER}

MACHINE_PATH = pytest.StashKey[str]()
LINKS = pytest.StashKey[Path]()


def link_programs(names: Iterable[str], path: str, folder: Path) -> list[str]:
    """Link the programs of these names that `path` (a PATH) has into a new folder; return those that it lacks."""
    folder.mkdir()
    found = {name: shutil.which(name, path=path) for name in names}
    for name, program in found.items():
        if program:
            (folder / name).symlink_to(program)
    return [name for name, program in found.items() if not program]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take everything else off the PATH, and other packages off the import path of subprocesses.

    The interpreter's own folder stays: in a virtual environment it holds the environment's programs and no others.
    """
    if session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput"):
        # This process only hands out tests. Its workers do as below, and have to find the PATH as it was.
        return
    session.config.stash[MACHINE_PATH] = os.environ["PATH"]
    session.config.stash[LINKS] = Path(tempfile.mkdtemp(prefix="programs-"))
    usual = session.config.stash[LINKS] / "usual"
    link_programs(PROGRAMS, os.environ["PATH"], usual)
    os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{usual}", "PYTHONNOUSERSITE": "1"}
    os.environ.pop("PYTHONPATH", None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the folder of links."""
    if LINKS in session.config.stash:
        shutil.rmtree(session.config.stash[LINKS])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Show a test, and fixtures that it is the first to ask for, the programs that it is marked as needing."""
    with pytest.MonkeyPatch.context() as patch:
        if names := needed_programs(item):
            folder = item.config.stash[LINKS] / "+".join(names)
            if not folder.exists():
                link_programs(names, item.config.stash[MACHINE_PATH], folder)
            patch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{folder}")
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of which a program is not installed, before any fixture is made, and say which program that is."""
    for name in needed_programs(item):
        if not shutil.which(name):
            pytest.skip(f"needs the program {name}, which is not installed")


def needed_programs(item: pytest.Item) -> list[str]:
    """The names that a test's markers stand for."""
    named = [name for marker in item.iter_markers("program") for name in marker.args]
    return [*named, *(name for marker in item.iter_markers() for name in NEEDED_BY_MARKER.get(marker.name, ()))]


@pytest.fixture(scope="session", autouse=True)
def _own_packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Behind the last test: fail if this process has imported anything that requirements.txt does not bring.

    Tests on a GPU are free of that, since images of GPU machines bring PyTorch and more in places of their own.
    """
    yield
    if any(item.get_closest_marker("gpu") for item in request.session.items):
        return
    files = [getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "." not in name]
    written_by_tests = tmp_path_factory.getbasetemp().parent
    foreign = [file for file in files if file and not (is_own(file) or Path(file).is_relative_to(written_by_tests))]
    assert not foreign, f"imported from outside the repository, its environment and the standard library: {foreign}"


def is_own(path: str) -> bool:
    """Whether the repository, the interpreter's environment or the standard library holds a file or folder.

    Of a relative path, as PyTorch gives to modules that it makes up, there is no file: it passes.
    """
    if not Path(path).is_absolute():
        return True
    file = Path(path).resolve()
    return _in_library(Path(path)) or file.is_relative_to(REPOSITORY) or file.is_relative_to(Path(sys.prefix).resolve())


def _in_library(path: Path) -> bool:
    """Whether a file lies in the standard library's folder, and not among the packages that are installed there.

    A link that lies there counts as well, wherever it leads: Debian keeps a module of its library in /etc.
    """
    library = Path(sysconfig.get_path("stdlib")).resolve()
    places = [place for place in (path.resolve(), path.parent.resolve() / path.name) if place.is_relative_to(library)]
    return any(not {"site-packages", "dist-packages"} & set(place.relative_to(library).parts) for place in places)
