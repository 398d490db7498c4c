"""Train the averaged weights of one seed a little further, on whole rows, before they are quantized.

Reads:  artifacts/average/<seed>/weights.safetensors, artifacts/tokens (the split that adapt.split names)
Writes: artifacts/adapt/<seed>: weights.safetensors, and adapt.json (split, epochs, loss of each epoch, seconds, and
        of how many processes they are)
Method: AdamW with one learning rate an epoch (fairway/adaptation); with 0 epochs the weights are passed on unchanged
Source: PR #1488, #1958. Ours: the split is a parameter, and the number of lanes does not depend on that of processes.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from torch import Tensor

from fairway.adaptation.row_training import adapt, load_rows
from fairway.model.gpt import load_network
from fairway.params import Params, load_params
from fairway.runtime.distributed import World, make_deterministic, start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import load_tensors, output_folder, save_tensors, write_atomic
from fairway.runtime.progress import Progress


def main() -> None:
    """Adapt the weights of one seed and write them with a report."""
    seed, _ = stage_arguments(sys.argv[1:], "adapt")
    params = load_params("params.yaml")
    make_deterministic()
    # Only the first process shows how far it is: progress is shown nowhere where stdout is None.
    with start_world() as world, redirect_stdout(None if world.rank else sys.stdout):
        started_at = time.monotonic()
        weights, losses = _adapted(params, seed, world)
        report = {
            "split": params.adapt.split,
            "epochs": params.adapt.epochs,
            "adapt_s": round(time.monotonic() - started_at, 3),
            "loss_nats": losses,
            "processes": world.size,
            "on_gpus": world.device.type == "cuda",
        }
        if world.rank == 0:
            with output_folder(Path(f"artifacts/adapt/{seed}")) as out:
                save_tensors(out / "weights.safetensors", weights)
                write_atomic(out / "adapt.json", json.dumps(report, indent=1) + "\n")


def _adapted(params: Params, seed: int, world: World) -> tuple[dict[str, Tensor], list[float]]:
    """The weights to pass on, and the loss of each epoch."""
    path, settings = Path(f"artifacts/average/{seed}/weights.safetensors"), params.adapt
    weights = load_tensors(path, f"python -m stages.average {seed}")
    if settings.epochs == 0:
        return weights, []
    model = load_network(params.model, weights, path, world.device)
    rows = load_rows(
        Path("artifacts/tokens"),
        settings.split,
        seq_len=params.model.seq_len,
        vocab_size=params.model.vocab_size,
        max_rows=settings.max_rows,
    )
    total = settings.epochs * len(rows)
    with Progress(f"adapt {seed}", total, unit="rows", processes=world.size) as progress:
        losses = adapt(model, rows.to(world.device), settings, progress.update, world=world)
    return model.state_dict(), losses


if __name__ == "__main__":
    run_stage(main)
