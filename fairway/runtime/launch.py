"""Run a module in several processes with torchrun, without the traceback that torchrun adds when one of them fails.

The process that failed has already said why, and torchrun's traceback shows torchrun's own code only. Everything else
is left as torchrun has it: its arguments, its log lines (which process failed, and how) and what the processes print.
Where one process on one machine is asked for, the module runs in this process, which saves the seconds that torchrun
needs to start.

Usage: python -m fairway.runtime.launch <arguments of torchrun>
"""

import runpy
import sys

# How the pipeline asks for a single process; the module's name and arguments come behind.
SINGLE = ["--standalone", "--nproc-per-node=1", "-m"]


def main() -> None:
    """Run the module. If a process fails, exit with the status of the first one: 128 + n where signal n ended it."""
    arguments = sys.argv[1:]
    if arguments[: len(SINGLE)] == SINGLE:
        sys.argv = arguments[len(SINGLE) :]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
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
