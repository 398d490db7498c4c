"""torchrun, which ends quietly when a process that it started has failed: that process has said why.

torchrun itself would add a traceback of its own, which shows nothing but torchrun. Its arguments, its log lines (which
process failed, and how) and everything the processes print are left as they are. A single process on one machine is not
started but is this one: that saves the seconds in which torchrun gets ready.

Usage: python -m fairway.runtime.launch <arguments of torchrun>
"""

import runpy
import sys

SINGLE = ["--standalone", "--nproc-per-node=1", "-m"]


def main() -> None:
    """Run torchrun; exit with the status of the process that failed first, 128 + n if signal n ended it."""
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
