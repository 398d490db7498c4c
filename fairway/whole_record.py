"""The whole record in one run, without DVC: what ships as train_gpt.py.

Reads:  FOLDER/val_*.bin, and tokenizer.model or val_bytes_*.bin; FOLDER/model.bin or, to make one, FOLDER/train_*.bin
Writes: FOLDER/model.bin if there is none; prints val_loss (nats per token) and val_bpb of model.bin
Usage:  python -m fairway.whole_record FOLDER in the repository, where it reads params.yaml; anywhere else
        python train_gpt.py [FOLDER], with the settings that pack has written into the program. Under torchrun all
        processes train and adapt; the first one then does the rest alone.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairway.adaptation.row_training import adapt, load_rows
from fairway.codec.artifact import load_artifact
from fairway.codec.container import check_round_trip, pack
from fairway.evaluation.collect import collect, measure
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.registry import evaluator_class, make_evaluator
from fairway.model.gpt import GPT, load_network
from fairway.params import ArtifactParams, Params, load_params
from fairway.quantization.calibrate import calibrate
from fairway.quantization.rate import quantize_to_size
from fairway.runtime.distributed import World, alone, make_deterministic, start_world
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic
from fairway.runtime.progress import Progress
from fairway.tokens.loader import Prefetcher
from fairway.tokens.validation import load_validation
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
    gptq = params.quantize.gptq
    if gptq:
        chosen |= {"fairway.quantization.calibrate.TEXTS": gptq.calibration}
        chosen |= {"fairway.quantization.gptq.GRIDS": params.quantize.grid}
    return chosen | params.evaluator_settings(params.compress.evaluator).looked_up()


def main() -> None:
    """Run the record of params.yaml."""
    params = load_params("params.yaml")
    name = params.compress.evaluator
    evaluator = make_evaluator(name, params.evaluator_settings(name), model=params.model, processes=1)
    run_record(params, params.seeds[0], _folder(), evaluator)


def run_shipped(params: ArtifactParams, evaluator: type[Evaluator], settings: EvaluatorSettings, seed: int) -> None:
    """Run the record inside train_gpt.py, where this is called with the shipped_arguments and the seed."""
    run_stage(lambda: run_record(params, seed, _folder(), evaluator(settings)))


def run_record(params: ArtifactParams, seed: int, folder: Path, evaluator: Evaluator) -> None:
    """Make folder/model.bin unless it is there, then print the score that the evaluator gives it."""
    path = folder / "model.bin"
    weights = None
    with start_world() as world:
        if not path.is_file():
            weights = trained_weights(params, seed, folder, world)
            make_deterministic()
            weights = adapted_weights(params, weights, folder, world)
    if world.rank:
        return
    if weights is not None:
        write_atomic(path, compressed(params, weights, seed, folder, world.device))
    print_score(evaluator, path, world.device)


def trained_weights(params: ArtifactParams, seed: int, folder: Path, world: World) -> dict[str, Tensor]:
    """Do what the stages train and average do: the weights of the kind that params.average names."""
    check_world(params.train, world)
    validation = load_validation(folder, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    model = GPT(params.model)
    model.init_weights(seed)
    model.to_device(world.device)
    with (
        Prefetcher(train_stream(params.model, params.train, folder, world), world.device) as loader,
        Progress("train", params.train.max_steps, unit="steps") as progress,
    ):

        def tick(step: int, figures: dict[str, float]) -> None:
            progress.update(step - progress.done, loss=figures["train_loss"])

        trained = train(model, loader, validation, params.train, world, log=lambda step, figures: None, tick=tick)
    kind = params.average.kind
    if kind not in trained.weights:
        raise UserError(f"params.yaml: average.method: {kind}: training kept only {', '.join(trained.weights)}")
    return trained.weights[kind]


def adapted_weights(
    params: ArtifactParams, weights: dict[str, Tensor], folder: Path, world: World
) -> dict[str, Tensor]:
    """Do what the stage adapt does: the same weights, or those adapted to the split that params.adapt names."""
    settings, config = params.adapt, params.model
    if not settings.epochs:
        return weights
    model = load_network(config, weights, folder, world.device)
    rows = load_rows(
        folder,
        settings.split,
        seq_len=config.seq_len,
        vocab_size=config.vocab_size,
        max_rows=settings.max_rows,
    )
    with Progress("adapt", settings.epochs * len(rows) // world.size, unit="rows") as progress:
        adapt(model, rows.to(world.device), settings, progress.update, world=world)
    return model.state_dict()


def compressed(
    params: ArtifactParams, weights: dict[str, Tensor], seed: int, folder: Path, device: torch.device
) -> bytes:
    """Do what the stages quantize and compress do: the bytes of model.bin."""
    weights = {name: weight.cpu() for name, weight in weights.items()}
    codec = params.compress.codec
    hessians = calibrate(params.model, params.quantize.gptq, weights, folder, folder, seed=seed, device=device)
    state, _, _ = quantize_to_size(
        weights, params.quantize, hessians, lambda state: len(pack(params.model, state, codec=codec))
    )
    model = pack(params.model, state, codec=codec)
    check_round_trip(model, params.model, state)
    return model


def print_score(evaluator: Evaluator, path: Path, device: torch.device) -> None:
    """Print the score that the evaluator gives model.bin on the validation stream beside it."""
    make_deterministic()
    model = load_artifact(path, device)
    config = model.config
    validation = load_validation(path.parent, seq_len=config.seq_len, vocab_size=config.vocab_size)
    tokens_N1, world = validation.tokens.to(device), alone(device)
    with Progress("evaluate", len(validation.bytes), unit="tokens") as progress:
        evaluation = evaluator.begin(model, tokens_N1, world)
        scores = collect(evaluation, tokens_N1, world, scored=lambda positions, nats: progress.update(len(nats)))
    figures = measure(scores, validation.bytes)
    print(f"val_loss: {figures['val_loss']:.8f}")
    print(f"val_bpb: {figures['val_bpb']:.8f}")


def _folder() -> Path:
    """The folder on the command line, or the working directory."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else ".")


if __name__ == "__main__":
    run_stage(main)
