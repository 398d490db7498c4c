"""Make the two files that ship: the compressed network and the program that trains and evaluates it.

Reads:  artifacts/quantize/<seed>/codes.safetensors; the code of fairway/
Writes: artifacts/compress/<seed>/model.bin (codec/container.py), train_gpt.py (packing/bundle.py)
Method: a stream of codes per class of tensor, by compress.codec; code cut to the record's settings, minified, packed
Source: PR #1172 (Brotli, packed code), #1855 (streams by kind). Ours: checksum, bounded reading, checked round trip.
"""

import sys
from pathlib import Path

from fairway.codec.codes import load_codes
from fairway.codec.container import check_round_trip, pack
from fairway.packing.bundle import bundle
from fairway.params import load_params
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import output_folder, write_atomic
from fairway.whole_record import shipped_arguments


def main() -> None:
    """Pack artifacts/quantize/<seed>."""
    seed, _ = stage_arguments(sys.argv[1:], "compress")
    params = load_params("params.yaml")
    state = load_codes(Path(f"artifacts/quantize/{seed}"))
    model = pack(params.model, state, codec=params.compress.codec)
    check_round_trip(model, params.model, state)
    program = bundle(Path(), "fairway.whole_record", shipped_arguments(params, seed))
    with output_folder(Path(f"artifacts/compress/{seed}")) as out:
        write_atomic(out / "model.bin", model)
        write_atomic(out / "train_gpt.py", program)
    print(f"model.bin {len(model):,} bytes, train_gpt.py {len(program):,} bytes")


if __name__ == "__main__":
    run_stage(main)
