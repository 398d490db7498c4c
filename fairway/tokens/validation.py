"""What later stages read of artifacts/tokens: the validation stream with its bytes, and a check of the whole folder.

A stream of n tokens is cut to whole rows: it has N = floor((n - 1) / seq_len) * seq_len targets, and target p is token
p + 1. Token 0, the first BOS, is never a target (data.md 8.1). Source: load_validation_tokens of the challenge's
train_gpt.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, require_file
from fairway.tokens.shards import open_shard, shard_paths, sidecar_paths, write_shard
from fairway.tokens.tokenizer import BOS, byte_table

# The command that errors about a token folder name.
MADE_BY = "python -m stages.tokenize"


@dataclass(frozen=True)
class Validation:
    """The validation stream: tokens (N + 1,) int64, and the bytes (N,) int64 that its targets stand for."""

    tokens: Tensor
    bytes: Tensor


def load_validation(folder: Path, *, seq_len: int, vocab_size: int, tokenizer: Path | None = None) -> Validation:
    """The validation stream of a token folder, cut to whole rows of seq_len tokens.

    Bytes come from the sidecars (val_bytes_*.bin) where there are any, otherwise from the byte table of the tokenizer,
    which is the folder's tokenizer.model unless another file is given. Raises UserError on a damaged shard, on a stream
    shorter than one row, or on a sidecar that is not as long as its shard.
    """
    tokens = np.concatenate([open_shard(path, vocab_size=vocab_size) for path in shard_paths(folder, "val")])
    targets = (len(tokens) - 1) // seq_len * seq_len
    if targets <= 0:
        raise UserError(f"{folder}: {len(tokens)} validation tokens, expected more than model.seq_len = {seq_len}")
    tokens = tokens[: targets + 1]
    if sidecars := open_sidecars(folder):
        target_bytes = np.concatenate(sidecars)[1 : targets + 1]
    else:
        table = byte_table(tokenizer or folder / "tokenizer.model", vocab_size)
        target_bytes = table.count(tokens[:-1], tokens[1:])
    return Validation(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        bytes=torch.from_numpy(target_bytes.astype(np.int64)),
    )


def open_sidecars(folder: Path) -> list[np.ndarray]:
    """The byte sidecars, each (n,) uint16, of the validation shards in their order; empty where there are none.

    Raises UserError if only some shards have a sidecar, or if one has not as many entries as its shard has tokens.
    """
    paths, shards = sidecar_paths(folder), shard_paths(folder, "val")
    if paths and len(paths) != len(shards):
        raise UserError(f"{folder}: {len(paths)} byte sidecars, expected {len(shards)} as there are validation shards")
    sidecars = [open_shard(path, vocab_size=None) for path in paths]
    for path, sidecar, shard in zip(paths, sidecars, shards, strict=False):
        if len(sidecar) != (tokens := len(open_shard(shard, vocab_size=None))):
            raise UserError(f"{path}: {len(sidecar)} entries, expected {tokens} as {shard} has tokens")
    return sidecars


def cut_validation(folder: Path, documents: int) -> dict[str, str]:
    """Leave the first so many documents in the validation shards and their sidecars; the files' new SHA-256 by name.

    The files are written anew, since a linked one is another folder's too. Files of which nothing is left are removed.
    """
    left, sidecars = documents, {path.name: path for path in sidecar_paths(folder)}
    digests = {}
    for path in shard_paths(folder, "val"):
        tokens = open_shard(path, vocab_size=None)
        begins = np.flatnonzero(tokens == BOS)
        end = int(begins[left]) if left < len(begins) else len(tokens) if left else 0
        left = max(left - len(begins), 0)
        for file in (path, sidecars.get(path.name.replace("val_", "val_bytes_", 1))):
            if file is not None:
                kept = open_shard(file, vocab_size=None)[:end].copy()
                file.unlink()
                if end:
                    write_shard(file, kept)
                    digests[file.name] = file_sha256(file)
    return digests


def verify_tokens(folder: Path, *, vocab_size: int) -> None:
    """Check the files of a token folder before expensive work begins.

    Each file that meta.json lists must be there, with the right header and length, ids of the vocabulary alone, and the
    SHA-256 in meta.json. No other shard may lie in the folder. Raises UserError naming the first file at fault, or
    meta.json if its vocabulary is not vocab_size.
    """
    meta = _read_meta(folder)
    if meta["vocab_size"] != vocab_size:
        raise UserError(
            f"{folder / 'meta.json'}: tokens of a vocabulary of {meta['vocab_size']}, expected {vocab_size} "
            "(tokenize.vocab_size)"
        )
    listed = {folder / name for name in meta["sha256"]}
    unlisted = {*shard_paths(folder, "train"), *shard_paths(folder, "val"), *sidecar_paths(folder)} - listed
    if unlisted:
        raise UserError(f"{min(unlisted)}: not listed in meta.json; run `{MADE_BY}` again")
    for name, expected in meta["sha256"].items():
        path = require_file(folder / name, MADE_BY)
        if path.suffix == ".bin":
            open_shard(path, vocab_size=None if "_bytes_" in name else vocab_size)
        if (found := file_sha256(path)) != expected:
            raise UserError(f"{path}: SHA-256 {found[:16]}..., expected {expected[:16]}...; run `{MADE_BY}` again")
    byte_table(folder / "tokenizer.model", vocab_size)


def _read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json. Raises UserError if it is missing, damaged, or without the keys that are needed."""
    path = require_file(folder / "meta.json", MADE_BY)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON; run `{MADE_BY}` again") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("sha256"), dict) or "vocab_size" not in meta:
        raise UserError(f"{path}: no vocab_size or sha256; run `{MADE_BY}` again")
    return meta
