"""The whole record in one run, without DVC: what ships as train_gpt.py.

Reads:  DATA_PATH/*val_*.bin with *val_bytes_*.bin or else the tokenizer TOKENIZER_PATH; model.bin in the working
        directory or, to make one, DATA_PATH/*train_*.bin. The stars stand for any beginning, such as the challenge's
        fineweb_.
Writes: model.bin in the working directory if there is none; prints the lines of the challenge's logs, of which the last
        one is the score of model.bin
Usage:  python train_gpt.py, with the settings that pack has written into the program, or in the repository
        python -m fairway.whole_record, which reads params.yaml. Under torchrun all processes train, adapt and evaluate;
        the first one quantizes and compresses while the others wait for model.bin, in a directory that all see.

The variables of the environment are those of the challenge's train_gpt.py. SEED is the seed; without it the program
takes the one in its second line, the repository the first of params.yaml. DATA_PATH is the working directory if it is
not set, and TOKENIZER_PATH the file tokenizer.model there.
"""

import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.adaptation.row_training import adapt, load_rows
from fairway.codec.artifact import load_artifact_once
from fairway.codec.codecs import CODECS
from fairway.codec.container import check_round_trip, pack
from fairway.evaluation.collect import collect, measure
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.registry import evaluator_class, make_evaluator
from fairway.model.gpt import GPT, load_network
from fairway.params import ArtifactParams, Params, load_params
from fairway.quantization.calibrate import calibrate
from fairway.quantization.rate import quantize_to_size
from fairway.runtime.challenge_log import end_line, epoch_lines, score_line, size_lines, step_line
from fairway.runtime.distributed import World, make_deterministic, start_world
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic
from fairway.runtime.progress import Figures, Progress
from fairway.tokens.loader import Prefetcher
from fairway.tokens.validation import Validation, load_validation
from fairway.training.loop import train
from fairway.training.training_files import check_world, train_stream


def shipped_arguments(params: Params) -> list[Any]:
    """The arguments of run_shipped that the packer writes into the program; the seed follows them.

    The params are cut to the sections that decide the artifact. The evaluator is given as its class. The packer links
    the module of the class and writes its name, because the program that ships has no files to import by name.
    """
    name = params.compress.evaluator
    artifact = ArtifactParams(**{section: getattr(params, section) for section in ArtifactParams.model_fields})
    return [artifact, evaluator_class(name), params.evaluator_settings(name)]


def chosen_options(params: Params) -> dict[str, str]:
    """The tables of which these settings use a single entry, with the key of that entry. The others need not ship."""
    chosen: dict[str, str] = {
        "fairway.codec.codecs.CODECS": params.compress.codec,
        "fairway.training.training_files.ORDERS": params.train.loader.kind,
    }
    chosen |= {"fairway.whole_record.ADAPTATIONS": params.adapt.form}
    gptq = params.quantize.gptq
    if gptq:
        chosen |= {"fairway.quantization.calibrate.TEXTS": gptq.calibration}
        chosen |= {"fairway.quantization.gptq.GRIDS": params.quantize.grid}
    return chosen | params.evaluator_settings(params.compress.evaluator).looked_up()


# The compressed network, which is made if it is not there.
MODEL = Path("model.bin")


@dataclass(frozen=True)
class Inputs:
    """What the environment says: the seed, the folder of the token shards, and the tokenizer's file."""

    seed: int
    data: Path
    tokenizer: Path


def inputs(seed: int) -> Inputs:
    """The inputs that the environment names. Raises UserError if SEED is set and no whole number."""
    given = os.environ.get("SEED", str(seed))
    if not given.isdecimal():
        raise UserError(f"SEED={given}: expected a whole number")
    data, tokenizer = (os.environ.get(*item) for item in (("DATA_PATH", "."), ("TOKENIZER_PATH", "tokenizer.model")))
    return Inputs(int(given), Path(data), Path(tokenizer))


def main() -> None:
    """Run the record of params.yaml."""
    params = load_params("params.yaml")
    name = params.compress.evaluator
    evaluator = make_evaluator(name, params.evaluator_settings(name), model=params.model, processes=params.processes)
    run_record(params, inputs(params.seeds[0]), evaluator)


def run_shipped(params: ArtifactParams, evaluator: type[Evaluator], settings: EvaluatorSettings, seed: int) -> None:
    """Run the record inside train_gpt.py, where this is called with the shipped_arguments and the seed."""
    run_stage(lambda: run_record(params, inputs(seed), evaluator(settings), program=Path(sys.argv[0])))


def run_record(params: ArtifactParams, given: Inputs, evaluator: Evaluator, program: Path | None = None) -> None:
    """Make model.bin unless it is there, then print the score that the evaluator gives it.

    `program` is the file whose bytes count as code; the repository has none. Only the first process prints.
    """
    with start_world() as world, redirect_stdout(None if world.rank else sys.stdout):
        print(f"seed:{given.seed} world_size:{world.size}")
        if not MODEL.is_file():
            make_model(params, evaluator, given, world)
        if program:
            print(size_lines(program.stat().st_size, MODEL.stat().st_size))
        print_score(params, evaluator, given, world)


def make_model(params: ArtifactParams, evaluator: Evaluator, given: Inputs, world: World) -> None:
    """Train with all processes and write model.bin in the first; the others come back when it is there.

    The evaluator is to score that model.
    """
    model, validation = GPT(params.model), _validation(params, given)
    model.init_weights(given.seed)
    check_what_follows(params, evaluator, model, validation, world)
    weights = trained_weights(params, model, validation, given, world)
    make_deterministic()
    weights = ADAPTATIONS[params.adapt.form](params, weights, given, world)
    if not world.rank:
        write_atomic(MODEL, compressed(params, weights, given, world.device))
    # An exchange between processes would end them after ten minutes of waiting.
    while not MODEL.is_file():
        time.sleep(0.1)


def check_what_follows(
    params: ArtifactParams, evaluator: Evaluator, model: GPT, validation: Validation, world: World
) -> None:
    """Raise UserError where adaptation, packing or evaluation would, after training has been paid for.

    That is if there are too many processes for either, or the stream does not fit the evaluator, or the codec needs a
    program that is not installed. `model`, on the CPU, is one like that to be trained.
    """
    if params.adapt.epochs:
        world.need_lanes(params.adapt.lanes, "adapt")
    CODECS[params.compress.codec].encode([np.zeros((1, 1), np.int8)])
    evaluator.begin(model, validation.tokens, replace(world, device=torch.device("cpu")))


def trained_weights(
    params: ArtifactParams, model: GPT, validation: Validation, given: Inputs, world: World
) -> dict[str, Tensor]:
    """Do what the stages train and average do: the weights of the kind that params.average names.

    `model` is initialised, and trained in place.
    """
    settings = params.train
    check_world(settings, world)
    model.to_device(world.device)
    print(f"model_params:{sum(weight.numel() for weight in model.parameters())}")
    clock_s = 0.0

    def tick(step: int, figures: Figures) -> None:
        nonlocal clock_s
        clock_s = figures["clock_s"]

    def log(step: int, figures: Figures) -> None:
        print(step_line(step, settings.max_steps, figures, clock_s), flush=True)

    with Prefetcher(train_stream(params.model, settings, given.data, world), world.device) as loader:
        trained = train(model, loader, validation, settings, world, log=log, tick=tick)
    print(end_line(trained.stopped_by, trained.steps, settings.max_steps, trained.clock_s))
    kind = params.average.kind
    if kind not in trained.weights:
        raise UserError(f"params.yaml: average.method: {kind}: training kept only {', '.join(trained.weights)}")
    return trained.weights[kind]


def adapted_weights(
    params: ArtifactParams, weights: dict[str, Tensor], given: Inputs, world: World
) -> dict[str, Tensor]:
    """Do what the stage adapt does: the weights adapted to the split that params.adapt names."""
    settings, config = params.adapt, params.model
    model = load_network(config, weights, given.data, world.device)
    rows = load_rows(
        given.data,
        settings.split,
        seq_len=config.seq_len,
        vocab_size=config.vocab_size,
        max_rows=settings.max_rows,
    )
    with Progress("adapt", settings.epochs * len(rows), unit="rows", processes=world.size) as progress:
        losses = adapt(model, rows.to(world.device), settings, progress.update, world=world)
    print(epoch_lines(losses))
    return model.state_dict()


def same_weights(_: ArtifactParams, weights: dict[str, Tensor], __: Inputs, ___: World) -> dict[str, Tensor]:
    """Do what the stage adapt does without epochs: nothing."""
    return weights


# By AdaptSettings.form. A table, so that the program that ships carries adaptation only if its record adapts.
ADAPTATIONS = {"none": same_weights, "rows": adapted_weights}


def compressed(params: ArtifactParams, weights: dict[str, Tensor], given: Inputs, device: torch.device) -> bytes:
    """Do what the stages quantize and compress do: the bytes of model.bin."""
    weights = {name: weight.cpu() for name, weight in weights.items()}
    codec, data = params.compress.codec, given.data
    hessians = calibrate(params.model, params.quantize.gptq, weights, data, data, seed=given.seed, device=device)
    state, _, _ = quantize_to_size(
        weights, params.quantize, hessians, lambda state: len(pack(params.model, state, codec=codec))
    )
    model = pack(params.model, state, codec=codec)
    check_round_trip(model, params.model, state)
    return model


def print_score(params: ArtifactParams, evaluator: Evaluator, given: Inputs, world: World) -> None:
    """Print the score that the evaluator gives model.bin on the validation stream, as the stage evaluate finds it."""
    make_deterministic()
    started_at = time.monotonic()
    model = load_artifact_once(MODEL, world)
    validation = _validation(params, given)
    tokens_N1 = validation.tokens.to(world.device)
    with Progress("evaluate", len(validation.bytes), unit="tokens", processes=world.size) as progress:
        evaluation = evaluator.begin(model, tokens_N1, world)
        scores = collect(evaluation, tokens_N1, world, scored=lambda positions, nats: progress.update(len(nats)))
    figures = measure(scores, validation.bytes)
    eval_s = time.monotonic() - started_at
    print(score_line(params.compress.evaluator, figures["val_loss"], figures["val_bpb"], eval_s))


def _validation(params: ArtifactParams, given: Inputs) -> Validation:
    """The validation stream and its bytes."""
    config = params.model
    return load_validation(given.data, seq_len=config.seq_len, vocab_size=config.vocab_size, tokenizer=given.tokenizer)


if __name__ == "__main__":
    run_stage(main)
