"""How long GPTQ takes on this machine, with random weights of a record's size.

Reads:  records/<record>.yaml (model, quantize)
Prints: seconds for the Hessians (quantize.gptq.batches batches of random tokens) and for rounding, cold and warm.
Usage:  python -m benchmarks.quantize r1172 [--batches 64]
"""

import argparse
import time

import numpy as np

from fairway.model.gpt import GPT
from fairway.params import load_params
from fairway.quantization.calibrate import calibrated_names, collect_hessians, random_rows
from fairway.quantization.quantize_weights import quantize_state
from fairway.runtime.distributed import make_deterministic, start_world


def main() -> None:
    """Time one record twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record")
    parser.add_argument("--batches", type=int)
    arguments = parser.parse_args()
    params = load_params(f"records/{arguments.record}.yaml")
    settings = params.quantize.gptq
    assert settings is not None, "a record with quantize.gptq"
    make_deterministic()
    world = start_world()
    model = GPT(params.model)
    model.init_weights(1)
    model.to_device(world.device)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    text = np.random.default_rng(0).integers(params.model.vocab_size, size=1 << 22)
    shape = arguments.batches or settings.batches, settings.batch_rows, params.model.seq_len
    for run in ("cold", "warm"):
        started_at = time.perf_counter()
        batches = random_rows(lambda start, count: text[start : start + count], len(text), shape, seed=0)
        hessians = collect_hessians(model, batches, calibrated_names(weights, settings))
        world.synchronize()
        collected_at = time.perf_counter()
        quantize_state(weights, params.quantize, hessians=hessians)
        collect_s, round_s = collected_at - started_at, time.perf_counter() - collected_at
        print(f"{arguments.record} {run}: Hessians {collect_s:.1f} s, rounding {round_s:.1f} s")


if __name__ == "__main__":
    main()
