"""Decide by experiment whether the score of one evaluator on one seed's artifact is a code length.

Reads:  artifacts/compress/<seed>/model.bin, artifacts/tokens, artifacts/evaluate/<seed>/<evaluator>; where the weights
        come from: artifacts/adapt/<seed>/adapt.json, artifacts/quantize/<seed>/quantize.json
Writes: artifacts/certify/<seed>/<evaluator>/certificate.json (legal; per condition: verdict, why, evidence)
Method: later tokens replaced, claims summed over a token's alternatives, slices coded and decoded, on a part of the
        stream in which the evaluator learns twice. Of the evaluator nothing is known but what it answers.
Source: the four conditions of the challenge's Issue #1017, over which PR #1150, #1172, #1488 and #1958 were contested.
        Ours: all experiments.
"""

import json
import sys
import time
from pathlib import Path

import torch

from fairway.certification.accounting import accounting, certificate, load_evaluation, with_provenance
from fairway.certification.experiments import certify
from fairway.codec.artifact import snapshot
from fairway.evaluation.registry import load_inputs, make_evaluator
from fairway.params import load_params
from fairway.runtime.distributed import make_deterministic, start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.files import output_folder, write_atomic
from fairway.runtime.progress import Progress
from fairway.tokens.tokenizer import BOS

ARTIFACTS = Path("artifacts")


def main() -> None:
    """Certify artifacts/evaluate/<seed>/<evaluator>."""
    seed, (name,) = stage_arguments(sys.argv[1:], "certify", "evaluator")
    params, started_at = load_params("params.yaml"), time.monotonic()
    settings = params.evaluator_settings(name)
    make_deterministic()
    # Most of the time goes into steps of a few tokens, which several threads only slow down.
    torch.set_num_threads(1)
    world = start_world()
    if world.device.type == "cuda":
        # What is compared has equal shapes; compiling, anew for each run, would serve nothing.
        torch.compiler.set_stance("force_eager")
    model, validation = load_inputs(ARTIFACTS, seed, world)
    unpacked = snapshot(model)
    evaluation = load_evaluation(ARTIFACTS, seed, name, len(validation.bytes))
    with Progress(f"certify {seed} {name}", params.certify.tokens, unit="tokens decoded") as progress:
        certified = certify(
            lambda: make_evaluator(name, settings, model=model.config, processes=1),
            model,
            unpacked,
            validation.tokens.to(world.device),
            params.certify,
            progress.update,
        )
    findings = with_provenance(certified.findings, evaluation.provenance)
    told_N = (validation.tokens[1:] == BOS) & certified.starts_told
    findings["accounting"] = accounting(evaluation, validation.bytes, told_N, cap_bytes=params.size_check.cap_bytes)
    found = certificate(name, findings, time.monotonic() - started_at)
    with output_folder(ARTIFACTS / f"certify/{seed}/{name}") as out:
        write_atomic(out / "certificate.json", json.dumps(found, indent=1) + "\n")
    print(f"certify {seed} {name}: legal: {found['legal']} in {found['certify_s']:.1f} s")


if __name__ == "__main__":
    run_stage(main)
