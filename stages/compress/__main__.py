"""Make the two files that ship, the compressed network and the program that trains and evaluates it, and run them.

Reads:  artifacts/quantize/<seed>/codes.safetensors, artifacts/tokens (validation stream); the code of model/, stages/
Writes: artifacts/compress/<seed>/model.bin (compress/container.py) and train_gpt.py (compress/bundle.py), if they score
        as the repository does (compress/shipped_run.py); in artifacts/cache/ the program's text, which seeds share
Method: a stream of codes per class of tensor, by compress.codec; code cut to the record's settings, minified, packed
Source: PR #1172 (Brotli, packed code), #1855 (streams by kind). Ours: checksum, bounded reading, checked round trip.
"""

import sys
from pathlib import Path

from stages.command_line import stage_arguments
from stages.compress.bundle import record_file
from stages.compress.container import check_round_trip, pack
from stages.compress.shipped_run import check_shipped_run
from stages.distributed import start_world
from stages.errors import run_stage
from stages.files import output_folder, write_atomic
from stages.params import load_params
from stages.quantize.codes import load_codes

ARTIFACTS = Path("artifacts")


def main() -> None:
    """Pack artifacts/quantize/<seed>."""
    seed, _ = stage_arguments(sys.argv[1:], "compress")
    params = load_params("params.yaml")
    state = load_codes(ARTIFACTS / f"quantize/{seed}")
    model = pack(params.model, state, codec=params.compress.codec)
    check_round_trip(model, params.model, state)
    program = record_file(params, seed, ARTIFACTS / "cache")
    with start_world() as world:
        run = check_shipped_run(program, model, params, ARTIFACTS / "tokens", world.device)
    with output_folder(ARTIFACTS / f"compress/{seed}") as out:
        write_atomic(out / "model.bin", model)
        write_atomic(out / "train_gpt.py", program)
    print(f"model.bin {len(model):,} bytes, train_gpt.py {len(program):,} bytes")
    print(f"run alone they score {run.targets:,} targets as here: {run.figures['val_loss']:.6f} nats per token")


if __name__ == "__main__":
    run_stage(main)
