"""Round the weights of one seed to integer codes.

Reads:  artifacts/adapt/<seed>/weights.safetensors; artifacts/tokens: the validation stream, for GPTQ also others
Writes: artifacts/quantize/<seed>: codes.safetensors (codes, scales, float16 tensors), quantize.json (figures by tensor,
        and what the quantized weights score on rows of one window)
Method: to nearest or by GPTQ (arXiv:2210.17323); clips by percentile or by sigma; LQER (arXiv:2402.02446)
Source: PR #1150, #1488 (percentiles), #1172 (GPTQ), #1855 (sigmas, LQER). Ours: the rule can differ between classes of
        tensors, and the steps between codes can be widened until model.bin has a given size.
"""

import json
import sys
import time
from pathlib import Path

from fairway.codec.codes import save_codes
from fairway.codec.container import pack
from fairway.params import load_params
from fairway.quantization.calibrate import calibrate
from fairway.quantization.quantize_weights import quantization_report
from fairway.quantization.quantized_rows import quantized_rows_bpb
from fairway.quantization.rate import quantize_to_size
from fairway.runtime.distributed import make_deterministic, start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import load_tensors, output_folder, write_atomic


def main() -> None:
    """Quantize the weights of one seed and write their codes with a report."""
    seed, _ = stage_arguments(sys.argv[1:], "quantize")
    params = load_params("params.yaml")
    path, tokens = Path(f"artifacts/adapt/{seed}/weights.safetensors"), Path("artifacts/tokens")
    weights = load_tensors(path, f"python -m stages.adapt {seed}")
    make_deterministic()
    world = start_world()
    started_at = time.monotonic()
    hessians = calibrate(params.model, params.quantize.gptq, weights, path, tokens, seed=seed, device=world.device)
    world.synchronize()
    calibrated_at = time.monotonic()
    state, chosen, coarseness = quantize_to_size(
        weights, params.quantize, hessians, lambda state: len(pack(params.model, state, codec=params.compress.codec))
    )
    seconds = {
        "calibration_s": round(calibrated_at - started_at, 3) if hessians else 0.0,
        "quantize_s": round(time.monotonic() - calibrated_at, 3),
    }
    rows_bpb = quantized_rows_bpb(params.model, params.train, state, path, tokens, world.device)
    report = {
        "quantized_rows_bpb": rows_bpb,
        "calibration": params.quantize.gptq.calibration if params.quantize.gptq else None,
        "coarseness": coarseness,
        "tensors": quantization_report(weights, state, chosen, params.quantize),
    }
    with output_folder(Path(f"artifacts/quantize/{seed}")) as out:
        save_codes(out, state)
        write_atomic(out / "quantize.json", json.dumps(seconds | report, indent=1) + "\n")
    print(f"quantize {seed}: rows of one window {rows_bpb:.6f} bits per byte")


if __name__ == "__main__":
    run_stage(main)
