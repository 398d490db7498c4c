"""A program named lrzip that stores instead of compressing, for machines without lrzip and for tests of how it is run.

What it writes begins as a file of lrzip does. It notes every run in a file, and can be made to wait for others.
"""

import os
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
action=pack
while [ "$1" != -o ]; do [ "$1" = -d ] && action=unpack; shift; done
echo $action >> "{folder}/runs"
echo >> "{folder}/$action"
tries=0
while [ "$(wc -l < "{folder}/$action")" -lt {together} ]; do
    sleep 0.05; tries=$((tries + 1)); [ $tries -gt 400 ] && exit 3
done
if [ $action = pack ]; then {{ printf LRZI; cat "$3"; }} > "$2"; else tail -c +5 "$3" > "$2"; fi
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, together: int = 1) -> Path:
    """Put the program first on PATH; a run goes on once `together` runs that do the same have started.

    Returns the file that gets a line, "pack" or "unpack", of every run.
    """
    program = folder / "lrzip"
    program.write_text(SCRIPT.format(folder=folder, together=together))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "runs"
