"""Faults that the user can mend, told in one line.

The arguments of the stages that run once per seed.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

# Most faults stop all processes of torchrun alike. The first one tells at once; the others wait this long, in which
# torchrun, that sees the first one gone, ends them.
OTHERS_WAIT_S = 5.0


class UserError(Exception):
    """Bad input or settings. The message is one line naming the file and key and what was expected."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; a UserError becomes one line on stderr and exit status 1, any other error its traceback."""
    try:
        main()
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        _exit("interrupted")


def _exit(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_S)
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def stage_arguments(arguments: list[str], stage: str, *more: str) -> tuple[int, list[str]]:
    """The seed, and the further arguments named in `more`. `stage` is how the usage calls it.

    Raises UserError unless there are exactly these and the seed is a whole number.
    """
    if len(arguments) != 1 + len(more) or not arguments[0].isdecimal():
        usage = " ".join(f"<{name}>" for name in ("seed", *more))
        raise UserError(f"usage: python -m stages.{stage} {usage}; found: {' '.join(arguments) or 'nothing'}")
    return int(arguments[0]), arguments[1:]
