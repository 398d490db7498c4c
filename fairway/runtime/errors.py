"""How a stage is called and how it fails: the arguments on its command line, and faults told in one line.

A fault that the user can mend, such as bad input or a setting that does not fit, is a UserError: its message is all
that the user sees. Any other exception is a defect of the program and keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# When a fault stops all processes that torchrun started, process 0 prints its message at once. The others wait this
# long first: torchrun sees process 0 end and stops them meanwhile, so that the message appears once.
OTHERS_WAIT_S = 5.0
# What the system says when there is no room for a file: on the disk, in one's share of it, or by a limit on its size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input or settings. The message is one line that names the file and key and says what was expected."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main. On a UserError, print its message on stderr and exit with status 1.

    An interrupt from the keyboard, a full disk and output that nobody reads end the same way. Any other exception
    passes through, with its traceback.
    """
    try:
        main()
    except UserError as error:
        _exit(str(error))
    except BrokenPipeError:
        # `head` has read enough, say. What is still to be written would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit("the reader of the output has left")
    except OSError as error:
        if error.errno not in FULL:
            raise
        _exit(f"{error.filename or Path.cwd()}: {error.strerror}")
    except KeyboardInterrupt:
        _exit("interrupted")


def _exit(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_S)
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def stage_arguments(arguments: list[str], stage: str, *more: str) -> tuple[int, list[str]]:
    """The seed on the command line of a stage that runs once per seed, and the arguments behind it.

    `stage` is the stage's name as the usage line shows it, `more` the names of the arguments behind the seed. Raises
    UserError with that usage line unless there are exactly these arguments and the seed is a whole number.
    """
    if len(arguments) != 1 + len(more) or not arguments[0].isdecimal():
        usage = " ".join(f"<{name}>" for name in ("seed", *more))
        raise UserError(f"usage: python -m stages.{stage} {usage}; found: {' '.join(arguments) or 'nothing'}")
    return int(arguments[0]), arguments[1:]


def no_arguments(stage: str) -> None:
    """Raise UserError with the usage line if this process, which runs the stage, was given arguments."""
    if sys.argv[1:]:
        raise UserError(f"usage: python -m stages.{stage}; found: {' '.join(sys.argv[1:])}")
