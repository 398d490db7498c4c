"""Let params.yaml be a record for so many GPUs: what `make record RECORD=name GPUS=n` does before it runs the pipeline.

Reads:  records/<name>.yaml, records/published.yaml, and params.yaml as it is and as git holds it
Writes: params.yaml, once this machine is seen to have what the record needs; changes of your own are never overwritten
Prints: the published score, minutes and cost
Method: fairway/chosen_record.py, fairway/preflight.py
Usage:  python -m stages.use_record r1172 1
"""

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fairway.chosen_record import Chosen, choose, expectation, record_names
from fairway.preflight import check_machine
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic

PARAMS, RECORDS = Path("params.yaml"), Path("records")


def main() -> None:
    """Write params.yaml, if that loses nothing and can run here."""
    arguments = sys.argv[1:]
    if len(arguments) != 2 or not arguments[0] or not arguments[1].isdecimal():
        known, found = ", ".join(record_names(RECORDS)), " ".join(arguments).strip() or "nothing"
        raise UserError(f"usage: make record RECORD=<one of {known}> GPUS=<number>; found: {found}")
    chosen = choose(RECORDS, arguments[0], int(arguments[1]))
    check_nothing_is_lost(chosen)
    try:
        check_machine(chosen.params, fetched=False)
    except UserError as error:
        raise UserError(f"{chosen.name} with GPUS={chosen.gpus}: {error}; {PARAMS} stays as it is") from None
    line = expectation(chosen, RECORDS / "published.yaml")
    write_atomic(PARAMS, chosen.text)
    print(f"use_record: {line}")


def check_nothing_is_lost(chosen: Chosen) -> None:
    """Raise UserError if params.yaml holds what neither git nor records/ hold."""
    if not PARAMS.exists():
        return
    now = PARAMS.read_text(encoding="utf-8")
    committed = subprocess.run(["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, check=False)
    if now in (chosen.text, committed.stdout.decode("utf-8", "replace")) or was_chosen(now):
        return
    raise UserError(
        f"{PARAMS}: holds changes that git does not; commit them, or `mv {PARAMS} mine.yaml`, and run this again"
    )


def was_chosen(text: str) -> bool:
    """Whether params.yaml is what this command made of some record earlier."""
    found = re.search(r"^processes: (\d+)$", text, re.MULTILINE)
    if found is None:
        return False
    for name in record_names(RECORDS):
        # A file of records/ that is damaged, or cannot take so many processes, is not the one.
        with suppress(UserError):
            if choose(RECORDS, name, int(found[1])).text == text:
                return True
    return False


if __name__ == "__main__":
    run_stage(main)
