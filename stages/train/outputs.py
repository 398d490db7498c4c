"""What a finished run leaves in artifacts/train/<seed>."""

import json
import shutil
from pathlib import Path

from stages.distributed import World
from stages.files import output_folder, write_atomic
from stages.params import Params
from stages.train.environment import environment, peak_memory_bytes
from stages.train.loop import Trained
from stages.weights import save_tensors


def write_outputs(folder: Path, trained: Trained, params: Params, world: World, *, live: Path) -> None:
    """Write one safetensors file a kind of weights, train.json, and a copy of the curves in `live`."""
    report = {
        "steps": trained.steps,
        "wall_s": round(trained.clock_s, 3),
        "stopped_by": trained.stopped_by,
        "train_tokens": trained.steps * params.train.batch_tokens,
        "step_ms": round(1000 * trained.clock_s / trained.steps, 3),
        "train_loss": trained.train_loss,
        "val_loss": trained.val_loss,
        "val_bpb": trained.val_bpb["last"],
        "val_bpb_by_weights": trained.val_bpb,
        "parameters": sum(weight.numel() for weight in trained.weights["last"].values()),
        "peak_memory_bytes": peak_memory_bytes(world),
        "environment": environment(world, params),
    }
    with output_folder(folder) as out:
        for kind, weights in trained.weights.items():
            save_tensors(out / f"{kind}.safetensors", weights)
        write_atomic(out / "train.json", json.dumps(report, indent=2) + "\n")
        shutil.copytree(live, out / "live")
