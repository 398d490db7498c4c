"""What texts are made of: a network from model.bin, and the tokenizer that it was trained with."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from fairway.codec.artifact import load_artifact
from fairway.decoding.spelling import Spelling
from fairway.model.gpt import GPT
from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, read_figures, require_file
from fairway.tokens.fused_pairs import from_json


@dataclass(frozen=True)
class Language:
    """A network in evaluation mode on the CPU, and the spelling of texts in its tokens.

    The fingerprint, 32 bytes, is that of the files of both; `source` names the network's file in messages.
    """

    model: GPT
    spelling: Spelling
    fingerprint: bytes
    source: str


def load_language(artifacts: Path, seed: int) -> Language:
    """The network in compress/<seed>/model.bin with the tokenizer in tokens/.

    Raises UserError if a file is missing or damaged, if they are of different vocabularies, or if the tokenizer cannot
    spell every text.
    """
    path = require_file(artifacts / f"compress/{seed}/model.bin", f"python -m stages.compress {seed}")
    tokens = artifacts / "tokens"
    meta = read_figures(tokens / "meta.json", "python -m stages.tokenize", ("transform", "vocab_size", "fused_pairs"))
    tokenizer = require_file(tokens / "tokenizer.model", "python -m stages.tokenize")
    model = load_artifact(path, torch.device("cpu"))
    if meta["vocab_size"] != model.config.vocab_size:
        raise UserError(
            f"{path}: a network for {model.config.vocab_size} tokens, expected {meta['vocab_size']} as in {tokens}"
        )
    parts = f"{file_sha256(path)} {file_sha256(tokenizer)} {meta['transform']} {meta['fused_pairs']}"
    fingerprint = hashlib.sha256(parts.encode()).digest()
    spelling = Spelling(tokenizer, meta["transform"], from_json(meta["fused_pairs"]))
    return Language(model, spelling, fingerprint, str(path))
