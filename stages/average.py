"""Choose which of the weights that training kept go on.

Reads:  artifacts/train/<seed>/<kind>.safetensors, of the kind that average.method names
Writes: artifacts/average/<seed>/weights.safetensors
Method: exponential moving average (arXiv:1412.6980, section 7.2), stochastic weight averaging (arXiv:1803.05407)
Source: all four records use their EMA; PR #1150, #1172 and #1488 also collect SWA and drop it. Ours: the last weights
        and every average that training kept can be chosen without training again.
"""

import sys
from pathlib import Path

from fairway.params import load_params
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import output_folder, save_tensors
from fairway.training.averages import kept_weights


def main() -> None:
    """Copy the chosen weights of one seed to artifacts/average."""
    seed, _ = stage_arguments(sys.argv[1:], "average")
    params = load_params("params.yaml")
    weights = kept_weights(Path(f"artifacts/train/{seed}"), params.average, made_by=f"python -m stages.train {seed}")
    with output_folder(Path(f"artifacts/average/{seed}")) as out:
        save_tensors(out / "weights.safetensors", weights)


if __name__ == "__main__":
    run_stage(main)
