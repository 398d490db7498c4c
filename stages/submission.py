"""Make the folder that is submitted to the challenge. Nothing in it is typed by hand.

Reads:  of every seed artifacts/train, adapt, quantize, compress, size_check, evaluate and certify, but the program of
        the first seed alone; artifacts/pack: requirements.txt, source; artifacts/tokens: tokenizer.model, meta.json
Writes: artifacts/submission/: README.md, submission.json, train_gpt.py, tokenizer.model, tokens.json (the tokens'
        meta.json), requirements.txt, source/ (the files that train_gpt.py is packed from) and train_seed<seed>.log of
        every seed
Source: the challenge's rules; the keys of submission.json are those of its baseline and of the records' folders. Ours:
        submission.json and README.md give the certificate's verdict, and a score that is not proven legal, or is of a
        part of the validation documents, is labelled so; README.md says how bytes are counted.
"""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import yaml

from fairway.params import load_params
from fairway.reporting.facts import subset
from fairway.reporting.handed_in import readme, submission_json, train_log
from fairway.reporting.runs import collect
from fairway.runtime.errors import no_arguments, run_stage
from fairway.runtime.files import output_folder, read_figures, require_file, write_atomic

ARTIFACTS = Path("artifacts")


def main() -> None:
    """Write artifacts/submission for the evaluator that ships."""
    no_arguments("submission")
    params = load_params("params.yaml")
    evaluator = params.compress.evaluator
    runs = collect(ARTIFACTS, params.seeds, [evaluator])
    shipped = runs[0].seed
    program = require_file(ARTIFACTS / f"compress/{shipped}/train_gpt.py", f"python -m stages.compress {shipped}")
    packages = require_file(ARTIFACTS / "pack/requirements.txt", "python -m stages.pack")
    tokenizer = require_file(ARTIFACTS / "tokens/tokenizer.model", "python -m stages.tokenize")
    keys = "val_text_bytes", "transform", "fused_pairs"
    meta = read_figures(ARTIFACTS / "tokens/meta.json", "python -m stages.tokenize", keys)
    source = require_file(ARTIFACTS / "pack/source/settings.yaml", "python -m stages.pack")
    settings = yaml.safe_load(source.read_text(encoding="utf-8"))
    today = datetime.now(UTC).date().isoformat()
    submission = submission_json(params.submission, evaluator, runs, date=today, subset=subset(meta))
    with output_folder(ARTIFACTS / "submission") as out:
        for run in runs:
            log = train_log(run, evaluator, max_steps=params.train.max_steps, subset=submission["subset"])
            write_atomic(out / f"train_seed{run.seed}.log", log)
        write_atomic(out / "submission.json", json.dumps(submission, indent=2) + "\n")
        write_atomic(out / "README.md", readme(submission, runs, meta, settings))
        shutil.copytree(source.parent, out / "source")
        shutil.copyfile(packages, out / "requirements.txt")
        shutil.copyfile(program, out / "train_gpt.py")
        shutil.copyfile(tokenizer, out / "tokenizer.model")
        write_atomic(out / "tokens.json", json.dumps(meta, indent=2) + "\n")
    print(f"artifacts/submission: val_bpb {submission['val_bpb']:.6f}, {submission['certificate']['verdict']}")


if __name__ == "__main__":
    run_stage(main)
