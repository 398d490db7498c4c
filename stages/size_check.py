"""Weigh the two files that ship against the track's cap.

Reads:  artifacts/compress/<seed>/train_gpt.py, model.bin
Writes: artifacts/size_check/<seed>: size.json (bytes by file and by class of tensor, headroom, bits per weight) and, if
        the files keep to the cap, within_cap. Its content never changes, so that evaluate, which waits for it, does not
        run again whenever the size changes by a byte.
Source: the challenge's rule: code plus compressed model, at most 16,000,000 decimal bytes. No record enforced it.
"""

import json
import sys
from pathlib import Path

from fairway.codec.artifact import over_cap, weigh
from fairway.params import load_params
from fairway.runtime.errors import UserError, run_stage, stage_arguments
from fairway.runtime.files import output_folder, require_file, write_atomic


def main() -> None:
    """Weigh artifacts/compress/<seed>. size.json is written even if the cap is exceeded."""
    seed, _ = stage_arguments(sys.argv[1:], "size_check")
    params = load_params("params.yaml")
    shipped = Path(f"artifacts/compress/{seed}")
    made_by = f"python -m stages.compress {seed}"
    program, model = (require_file(shipped / name, made_by) for name in ("train_gpt.py", "model.bin"))
    try:
        size = weigh(program.read_bytes(), model.read_bytes(), cap_bytes=params.size_check.cap_bytes)
    except UserError as error:
        raise UserError(f"{model}: {error}") from None
    with output_folder(Path(f"artifacts/size_check/{seed}")) as out:
        write_atomic(out / "size.json", json.dumps(size, indent=1) + "\n")
        if size["headroom_bytes"] >= 0:
            write_atomic(out / "within_cap", "yes\n")
    if size["headroom_bytes"] < 0:
        raise UserError(f"{shipped}: {over_cap(size)}")
    print(f"{size['total_bytes']:,} bytes, {size['headroom_bytes']:,} below the cap of {size['cap_bytes']:,}")


if __name__ == "__main__":
    run_stage(main)
