"""A program `python` whose command lines are run by forks of one process that has imported PyTorch.

What the project's commands start is then real (a shell, DVC, torchrun, the code of the folder), but for Python's own
start: importing PyTorch takes almost two CPU-seconds, and most stages of a toy experiment far less. Run as a script,
this file is that process; tests/warm_client.py is the program.
"""

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from forks import LIMIT_S, exit_status

CLIENT = Path(__file__).with_name("warm_client.py")
# What stages import besides the project: of that, nothing, so that a fork runs the code of the folder that it is in.
IMPORTED = "torch torch.distributed.run numpy.random yaml pydantic.main safetensors.torch sentencepiece tqdm brotli"
IMPORTED += " constriction mpmath zstandard jinja2 python_minifier pyppmd resource statistics"


@functools.cache
def warm_python() -> str:
    """The program, in a folder that holds nothing else; its process starts with the first call and ends with ours."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder)
    address, program = folder / "socket", folder / "bin/python"
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.read() == b"", "closed once it listens"
    # Its stdin ends with this process, however that ends.
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(CLIENT), str(address)])} "$@"\n')
    program.chmod(0o755)
    return str(program)


def warm_environment() -> dict[str, str]:
    """Variables under which a shell's `python`, and so DVC's and torchrun's, is the warm one."""
    program = warm_python()
    path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHON_EXEC": program}


def _serve(address: str) -> None:
    """Fork for every command line that comes, until stdin ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        # Whoever started us reads our stdout until here.
        os.dup2(2, 1)
        while server.fileno() in select.select([server.fileno(), 0], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    _answer(connection)
            _reap()


def _reap() -> None:
    """Let go of forks that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def _answer(connection: socket.socket) -> NoReturn:
    """In the fork: become what the client was started as, and tell it the exit status. A fork that dies tells none."""
    try:
        signal.alarm(LIMIT_S)
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        with connection.makefile("rb") as request:
            arguments, folder, environment = json.load(request)
        # Once the client is gone, killed by torchrun for one, this process gets a SIGIO, which ends it.
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        status = exit_status(lambda: _run(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status % 256]))
    finally:
        os._exit(0)


def _run(arguments: list[str]) -> None:
    """What Python does with a command line, for those that tests need: a module, code, or a file, isolated or not."""
    flags = {argument for argument in arguments if argument in ("-I", "-P", "-u")}
    kind, *rest = arguments[len(flags) :]
    is_file = kind not in ("-m", "-c")
    sys.argv[:] = [kind, *rest] if is_file else rest
    if not flags & {"-I", "-P"}:
        sys.path.insert(0, str(Path(kind).resolve().parent) if is_file else os.getcwd())
    if is_file:
        runpy.run_path(kind, run_name="__main__")
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        exec(rest[0], {"__name__": "__main__"})


if __name__ == "__main__":
    for name in IMPORTED.split():
        importlib.import_module(name)
    # The folder of the tests, to which an import leads only in a test.
    del sys.path[0]
    gc.freeze()
    _serve(sys.argv[1])
