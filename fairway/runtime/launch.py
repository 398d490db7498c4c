"""Run a module in several processes with torchrun, without the traceback that torchrun adds when one of them fails.

The process that failed has already said why, and torchrun's traceback shows torchrun's own code only. Everything else
is left as torchrun has it: its arguments, its log lines (which process failed, and how) and what the processes print.
Where one process on one machine is asked for, the module runs in this process, which saves the seconds that torchrun
needs to start.

With --check, for modules that have an option of that name, the module is first asked by a process of its own whether it
can run: what it says is then told once, before torchrun starts. A module that runs in this process asks itself.

Usage: python -m fairway.runtime.launch [--check] <arguments of torchrun>
"""

import runpy
import subprocess
import sys

# How the pipeline asks for a single process; the module's name and arguments come behind.
SINGLE = ["--standalone", "--nproc-per-node=1", "-m"]


def main() -> None:
    """Run the module. If a process fails, exit with the status of the first one: 128 + n where signal n ended it."""
    checks = sys.argv[1:2] == ["--check"]
    arguments = sys.argv[1 + checks :]
    if arguments[: len(SINGLE)] == SINGLE:
        sys.argv = arguments[len(SINGLE) :]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    if checks:
        module, *rest = arguments[arguments.index("-m") + 1 :]
        asked = subprocess.run([sys.executable, "-m", module, "--check", *rest])
        if asked.returncode:
            raise SystemExit(asked.returncode)
    _launch(arguments)


def _launch(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None


if __name__ == "__main__":
    main()
