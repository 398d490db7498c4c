"""Score the compressed artifact of one seed on the validation stream with one evaluator.

Reads:  artifacts/compress/<seed>/model.bin, artifacts/tokens (validation stream and its bytes)
Writes: artifacts/evaluate/<seed>/<evaluator>: nats.npz (`nats`, float64, one per target) and metrics.json (val_bpb,
        counts of targets, chunks and updates, seconds, and of how many processes they are). While it runs: resume
        points in artifacts/resume/evaluate-<seed>-<evaluator>
Method: fairway/evaluation/<kind>.py; bits per byte of the original text
Source: the challenge's evaluation (PR #549, #1150, #1493). Ours: evaluators share one scoring core, scores are kept;
        under torchrun the result does not depend on the number of processes.
"""

import json
import shutil
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np

from fairway.evaluation.collect import RunningScore, collect, measure
from fairway.evaluation.registry import evaluation_fingerprint, load_inputs, make_evaluator
from fairway.params import load_params
from fairway.runtime.distributed import make_deterministic, start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import output_folder, write_atomic
from fairway.runtime.resume import ResumePoints

ARTIFACTS = Path("artifacts")


def main() -> None:
    """Score artifacts/compress/<seed>/model.bin with <evaluator>."""
    seed, (name,) = stage_arguments(sys.argv[1:], "evaluate", "evaluator")
    params = load_params("params.yaml")
    settings = params.evaluator_settings(name)
    make_deterministic()
    with start_world() as world:
        # The clock counts reading, unpacking, compilation and every adaptation, but not imports and writing the result.
        started_at = time.monotonic()
        model, validation = load_inputs(ARTIFACTS, seed, world)
        world.synchronize()
        load_s = time.monotonic() - started_at
        evaluator = make_evaluator(name, settings, model=model.config, processes=world.size)
        tokens_N1, bytes_N = validation.tokens.to(world.device), validation.bytes.to(world.device)
        mark = evaluation_fingerprint(ARTIFACTS, seed, name, settings, processes=world.size)
        points = ResumePoints(ARTIFACTS / f"resume/evaluate-{seed}-{name}", mark)
        with RunningScore(f"evaluate {seed} {name}", bytes_N, world) as running:
            evaluation = evaluator.begin(model, tokens_N1, world)
            scores = collect(evaluation, tokens_N1, world, scored=running.add, points=points)
        eval_s = scores.earlier_s + time.monotonic() - started_at
        if world.rank == 0:
            metrics = {
                "evaluator": name,
                **measure(scores, validation.bytes),
                "chunks": evaluation.chunks,
                "updates": evaluation.updates,
                "load_s": round(load_s, 3),
                "eval_s": round(eval_s, 3),
                "processes": world.size,
                "on_gpus": world.device.type == "cuda",
            }
            with output_folder(ARTIFACTS / f"evaluate/{seed}/{name}") as out:
                np.savez(nats := BytesIO(), nats=scores.nats_N.numpy())
                write_atomic(out / "nats.npz", nats.getvalue())
                write_atomic(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
            shutil.rmtree(points.folder, ignore_errors=True)
            print(f"evaluate {seed} {name}: val_bpb {metrics['val_bpb']:.6f} in {eval_s:.1f} s")


if __name__ == "__main__":
    run_stage(main)
