"""A published export (fetch.source = hub) as token shards: checked, given a second name, and described in meta.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UserError
from stages.fetch.hub import link_or_copy
from stages.params import Tokenize
from stages.tokenize.bytes import byte_table
from stages.tokenize.encode import RESERVED
from stages.tokenize.shards import file_sha256, open_shard, shard_paths
from stages.tokenize.tokenizer import BOS, check_tokenizer
from stages.tokenize.validation import open_sidecars


def adopt_export(fetched: Path, folder: Path, settings: Tokenize) -> dict[str, Any]:
    """Link the shards and the tokenizer of a fetched export into `folder`; return what meta.json says of them.

    How many bytes the published text has before folding is not known: `*_text_bytes` are null. Raises UserError if the
    `tokenize` section disagrees with the export, or a file with its checksum, its sidecar or the manifest's counts.
    """
    about = json.loads((fetched / "hub.json").read_text(encoding="utf-8"))
    _require_agreement(about, settings)
    for name, expected in about["sha256"].items():
        if (found := file_sha256(fetched / name)) != expected:
            raise UserError(f"{fetched / name}: SHA-256 {found[:16]}..., expected {expected[:16]}...; fetch it again")
        link_or_copy(fetched / name, folder / name)
    check_tokenizer(folder / "tokenizer.model", vocab_size=settings.vocab_size, operators=RESERVED[settings.transform])
    counts = {split: _count(folder, split, settings.vocab_size) for split in ("train", "val")}
    promised = about["val_documents"], about["val_tokens"]
    if counts["val"] != promised:
        raise UserError(
            f"{fetched}: the validation shards hold {counts['val']} (documents, tokens), the manifest says {promised}"
        )
    return {
        "vocab_size": settings.vocab_size,
        "transform": settings.transform,
        "source": {key: about[key] for key in ("repository", "revision", "variant")},
        "val_bytes": _validation_bytes(folder, settings),
        **{f"{split}_documents": documents for split, (documents, _) in counts.items()},
        **{f"{split}_tokens": tokens for split, (_, tokens) in counts.items()},
        **{f"{split}_text_bytes": None for split in counts},
        "compressed_val_bytes": {},
        "sha256": about["sha256"],
    }


def _require_agreement(about: dict[str, Any], settings: Tokenize) -> None:
    for key in ("vocab_size", "val_documents", "transform"):
        if getattr(settings, key) != about[key]:
            raise UserError(f"params.yaml: tokenize.{key}: expected {about[key]}, as {about['variant']} has it")
    if settings.model is not None:
        raise UserError(
            f"params.yaml: tokenize.model: expected null, since {about['variant']} brings its own tokenizer"
        )


def _count(folder: Path, split: Any, vocab_size: int) -> tuple[int, int]:
    """Documents (each begins with BOS) and tokens of a split."""
    shards = [open_shard(path, vocab_size=vocab_size) for path in shard_paths(folder, split)]
    return sum(int(np.count_nonzero(shard == BOS)) for shard in shards), sum(map(len, shards))


def _validation_bytes(folder: Path, settings: Tokenize) -> int:
    """Bytes over all validation targets, by the sidecar if there is one, else by the byte table."""
    if sidecars := open_sidecars(folder):
        return sum(int(sidecar.sum(dtype=np.int64)) for sidecar in sidecars)
    tokens = np.concatenate([open_shard(path, vocab_size=None) for path in shard_paths(folder, "val")])
    table = byte_table(folder / "tokenizer.model", settings.vocab_size)
    return int(table.count(tokens[:-1], tokens[1:]).sum(dtype=np.int64))
