"""Make the two files that ship, the compressed network and the program that trains and evaluates it, and try them out.

Reads:  artifacts/quantize/<seed>/codes.safetensors, artifacts/pack/program.py, artifacts/tokens (validation stream)
Writes: artifacts/compress/<seed>: model.bin (codec/container.py) and train_gpt.py (packing/bundle.py), if they score as
        the repository does (packing/shipped_run.py), and compress.json with the seconds that this took
Method: one stream of codes for each class of tensors, packed by compress.codec; the program's text is compressed
        and put behind a stub that unpacks it
Source: PR #1172 (Brotli, packed code), #1855 (streams by kind). Ours: checksum, bounded reading, checked round trip.
"""

import json
import sys
import time
from pathlib import Path

from fairway.codec.codes import load_codes
from fairway.codec.container import check_round_trip, pack
from fairway.packing.bundle import self_extracting
from fairway.packing.shipped_run import check_shipped_run
from fairway.params import load_params
from fairway.runtime.distributed import start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import output_folder, require_file, write_atomic

ARTIFACTS = Path("artifacts")


def main() -> None:
    """Pack artifacts/quantize/<seed>, and write the files once they have been tried."""
    seed, _ = stage_arguments(sys.argv[1:], "compress")
    params = load_params("params.yaml")
    text = require_file(ARTIFACTS / "pack/program.py", "python -m stages.pack").read_text(encoding="utf-8")
    state = load_codes(ARTIFACTS / f"quantize/{seed}")
    started_at = time.monotonic()
    model = pack(params.model, state, codec=params.compress.codec)
    packed_at = time.monotonic()
    check_round_trip(model, params.model, state)
    program, name = self_extracting(text, seed=seed), params.compress.evaluator
    with start_world() as world:
        settings = params.evaluator_settings(name)
        run = check_shipped_run(program, model, name, settings, ARTIFACTS / "tokens", world.device)
    report = {
        "pack_s": round(packed_at - started_at, 3),
        "trial_s": round(time.monotonic() - packed_at, 3),
        "trial_targets": run.targets,
    }
    with output_folder(ARTIFACTS / f"compress/{seed}") as out:
        write_atomic(out / "model.bin", model)
        write_atomic(out / "train_gpt.py", program)
        write_atomic(out / "compress.json", json.dumps(report, indent=1) + "\n")
    print(f"model.bin {len(model):,} bytes, train_gpt.py {len(program):,} bytes")
    print(f"run alone they score {run.targets:,} targets as here: {run.figures['val_loss']:.6f} nats per token")


if __name__ == "__main__":
    run_stage(main)
