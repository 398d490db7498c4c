"""What a record's network learns from given documents in its first steps, to lay beside what its program did.

Reads:  CORPUS (JSONL or JSONL.zst with `text`), a SentencePiece model, records/<record>.yaml
Prints: at steps 1, 2, 3, 10, every 50 and where it validates: training loss, bits per byte, ms per step so far.
Method: the last documents of the corpus validate, the others train in file order. With --steps as the published
        programs were run on one GPU: gradients clipped once a step, the learning rate down to 0 over the last half.
        With --seconds as the record has it, on a clock of that length.
Usage:  python -m benchmarks.learning CORPUS TOKENIZER r1488 [--seed 1337] [--steps 300 | --seconds 300]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fairway.model.gpt import GPT
from fairway.params import Params
from fairway.runtime.distributed import start_world
from fairway.runtime.progress import Figures
from fairway.tokens.documents import open_lines
from fairway.tokens.export import tokenize_documents
from fairway.tokens.loader import Prefetcher
from fairway.tokens.validation import load_validation
from fairway.training.loop import train
from fairway.training.training_files import train_stream

SHOWN_STEPS = (1, 2, 3, 10)


def main() -> None:
    """Tokenize, train, and print a line for every step shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("record")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--val-documents", type=int, default=400)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=300)
    length.add_argument("--seconds", type=float)
    chosen = parser.parse_args()
    params = _params(chosen)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        meta = tokenize_documents(_validation_first(chosen, folder), folder, params.tokenize)
        (folder / "meta.json").write_text(json.dumps(meta))
        print(f"{meta['train_tokens']} tokens train, {meta['val_tokens']} validate", flush=True)
        _learn(params, chosen.seed, folder)


def _params(chosen: argparse.Namespace) -> Params:
    """The record's params on one process, as the arguments change them."""
    raw: dict[str, Any] = yaml.safe_load(Path(f"records/{chosen.record}.yaml").read_text())
    raw["processes"] = 1
    raw["tokenize"] |= {"model": str(chosen.tokenizer), "val_documents": chosen.val_documents}
    warmup_steps = min(3, raw["train"]["warmup_steps"])
    raw["train"] |= {"reserve_s": 0.0, "val_every": 100, "log_every": 50, "warmup_steps": warmup_steps}
    if chosen.seconds:
        raw["train"] |= {"max_wallclock_s": chosen.seconds}
    else:
        raw["train"] |= {"max_steps": chosen.steps, "max_wallclock_s": None, "clip": "step"}
        raw["train"]["schedule"] |= {"warmdown_unit": "steps", "warmdown": chosen.steps / 2}
    return Params.model_validate(raw)


def _validation_first(chosen: argparse.Namespace, folder: Path) -> Path:
    """The documents with the last ones first, where the pipeline looks for those that validate."""
    with open_lines(chosen.corpus) as (lines, _):
        documents = list(lines)
    path = folder / "docs.jsonl"
    with path.open("wb") as file:
        for line in documents[-chosen.val_documents :] + documents[: -chosen.val_documents]:
            file.write(line.rstrip(b"\n") + b"\n")
    return path


def _learn(params: Params, seed: int, tokens: Path) -> None:
    """Train on the tokens in a folder."""

    def show(step: int, figures: Figures) -> None:
        if "val_bpb" in figures:
            print(f"step {step}: {figures['val_bpb']:.4f} bits per byte", flush=True)
        elif step in SHOWN_STEPS or step % params.train.log_every == 0:
            print(f"step {step}: loss {figures['train_loss']:.4f}, {figures['step_ms']:.0f} ms a step", flush=True)

    with start_world() as world:
        model = GPT(params.model)
        model.init_weights(seed)
        model.to_device(world.device)
        validation = load_validation(tokens, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
        with Prefetcher(train_stream(params.model, params.train, tokens, world), world.device) as loader:
            trained = train(model, loader, validation, params.train, world, log=show, tick=lambda step, figures: None)
    print(f"seed {seed}, {trained.steps} steps: {json.dumps(trained.val_bpb)}")


if __name__ == "__main__":
    main()
