"""Code run by a fork of the test process: as apart from it as a process of its own, but without the start of one.

Python and PyTorch take almost two CPU-seconds to start, and most stages of a toy experiment far less to run. A test of
the start itself (a command line, torchrun, a signal) begins a real process instead. Forks cannot use a GPU.
"""

import io
import os
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO, NoReturn

# The kernel ends a fork that runs longer.
LIMIT_S = 240


class Fork:
    """A call under way in a fork of this process."""

    def __init__(self, call: Callable[[], object], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        """Begin `call` in the folder, with `environment` added to the variables of this process."""
        self._output, self._errors = _empty_file(), _empty_file()
        with warnings.catch_warnings():
            # From 3.12 on Python warns that another thread may hold a lock. pytest-xdist's does, of its own channel.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._become(call, folder, environment or {})

    def _become(self, call: Callable[[], object], folder: Path, environment: Mapping[str, str]) -> NoReturn:
        """In the fork: make the call and exit as Python does, but leave alone what pytest would do at its exit."""
        status = 1
        try:
            signal.alarm(LIMIT_S)
            os.chdir(folder)
            os.environ.update(environment)
            sys.stdin, sys.stdout, sys.stderr = io.StringIO(), self._output, self._errors
            os.dup2(self._output.fileno(), 1)
            os.dup2(self._errors.fileno(), 2)
            status = exit_status(call)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        """End it at once, as kill -9 does, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait().returncode == -signal.SIGKILL

    def wait(self) -> CompletedProcess[str]:
        """Its exit status (-n if signal n ended it) and what it printed."""
        _, status = os.waitpid(self.pid, 0)
        printed = []
        for file in (self._output, self._errors):
            with file:
                file.seek(0)
                printed.append(file.read())
        return CompletedProcess([], os.waitstatus_to_exitcode(status), *printed)


def _empty_file() -> IO[str]:
    """A file for what a fork prints, which lasts until it is closed."""
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def exit_status(call: Callable[[], object]) -> int:
    """In a fork: make the call; return the status that Python would exit with, and say on stderr what it would say."""
    _renew_threads()
    try:
        call()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _renew_threads() -> None:
    """Let PyTorch, if it was imported, replace its pool of threads, none of which a fork inherits.

    It would do so when the pool is first asked for, and would fail now and then ("Invalid thread pool!") where the call
    has threads of its own, such as those that unpack model.bin, and two of them ask at once.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def ranks(call: Callable[[], object], folder: Path, *, processes: int) -> list[CompletedProcess[str]]:
    """Make the call in so many forks at once, to which it must look as if torchrun had started them; how each ended.

    They find one another at a port that was free a moment before. Raises AssertionError if one of them fails.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [Fork(call, folder, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    ended = [fork.wait() for fork in started]
    assert [done.returncode for done in ended] == [0] * processes, "\n".join(done.stderr for done in ended)
    return ended
