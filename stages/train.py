"""Train the network of one seed, in this process or in those that torchrun started.

Reads:  artifacts/tokens: training and validation shards, tokenizer.model, meta.json
Writes: artifacts/train/<seed>: last.safetensors, ema_<decay>.safetensors, swa.safetensors if any were collected,
        train.json (figures), live/ (curves). While it runs: resume points and curves in artifacts/resume/train-<seed>
Method: Muon (kellerjordan.github.io/posts/muon) and AdamW (arXiv:1711.05101) on next-token cross-entropy
Source: PR #1150, #1172, #1488, #1958. Ours: neither the order of the data nor the batch of a step depends on the number
        of processes, one clock decides for all of them, and a killed run goes on where it was.
Usage:  python -m stages.train [--check] <seed>      (--check only looks at params and tokens)
"""

import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

from fairway.model.gpt import GPT
from fairway.params import Params, load_params
from fairway.preflight import check_training
from fairway.runtime.distributed import World, start_world
from fairway.runtime.errors import run_stage, stage_arguments
from fairway.runtime.progress import TrainLog, silent
from fairway.runtime.resume import ResumePoints, only_run
from fairway.tokens.loader import Prefetcher
from fairway.tokens.validation import load_validation
from fairway.training.loop import Trained, train
from fairway.training.schedule import run_budget
from fairway.training.training_files import check_world, fingerprint, memory_named, train_stream, write_outputs

TOKENS = Path("artifacts/tokens")


def main() -> None:
    """Train one seed, or only check that it could be trained."""
    started_at = time.monotonic()
    check_only = sys.argv[1:2] == ["--check"]
    seed, _ = stage_arguments(sys.argv[1 + check_only :], "train [--check]")
    params = load_params("params.yaml")
    resume = Path(f"artifacts/resume/train-{seed}")
    if check_only:
        check_training(params, seed, TOKENS, resume)
        return
    with start_world() as world:
        check_world(params.train, world)
        if world.size == 1:
            check_training(params, seed, TOKENS, resume)
        with only_run(resume) if world.rank == 0 else nullcontext():
            trained, start_s = _train(params, seed, world, resume, started_at)
            if world.rank == 0:
                out, live = Path(f"artifacts/train/{seed}"), resume / "live"
                write_outputs(out, trained, params.model, params.train, world, live=live, start_s=start_s)
                shutil.rmtree(resume)


def _train(params: Params, seed: int, world: World, resume: Path, started_at: float) -> tuple[Trained, float]:
    """Build what the training loop needs, and run it. Returns also how many seconds after `started_at` it began."""
    model = GPT(params.model)
    model.init_weights(seed)
    model.to_device(world.device)
    validation = load_validation(TOKENS, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    points = ResumePoints(resume, fingerprint(params.model, params.train, seed, TOKENS))
    with ExitStack() as held:
        held.enter_context(memory_named(params.train, world))
        loader = held.enter_context(Prefetcher(train_stream(params.model, params.train, TOKENS, world), world.device))
        budget = run_budget(params.train)
        log = tick = silent
        if world.rank == 0:
            shown = held.enter_context(TrainLog(resume / "live", steps=budget.steps, seconds=budget.clock_s))
            log, tick = shown.log, shown.tick
        start_s = time.monotonic() - started_at
        return train(model, loader, validation, params.train, world, log=log, tick=tick, points=points), start_s


if __name__ == "__main__":
    run_stage(main)
