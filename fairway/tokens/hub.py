"""A published export from a Hugging Face dataset repository: token shards, their tokenizer, and a manifest.

With `fetch.source: hub` the stage fetch downloads one (fetch_hub), and the stage tokenize takes its shards over after
checking them (adopt_export), since there are no documents to tokenize.

Downloads go through huggingface_hub's own cache. What lies there whole is not fetched again: a killed run goes on with
the file at which it was killed, and a cut connection is taken up inside the file. Without a network a complete cache is
enough. The library checks sizes only, so each file is checked here against the checksum that the hub states.

Source: cached_challenge_fineweb.py of the challenge; for byte sidecars that of PR #1729.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256, write_atomic
from fairway.runtime.progress import Progress
from fairway.runtime.settings import Section
from fairway.tokens.fused_pairs import Pair, as_json, fuse_shards
from fairway.tokens.shards import open_shard, shard_paths
from fairway.tokens.tokenizer import BOS, RESERVED, TokenizeSettings, byte_table, check_tokenizer
from fairway.tokens.validation import cut_validation, open_sidecars


class FetchHub(Section):
    """Published token shards from a Hugging Face dataset repository; there are no documents then."""

    source: Literal["hub"]
    repository: str
    # A commit, so that the same params always mean the same shards (a branch or tag works too).
    revision: str
    # Folder of the export inside the repository: all published ones use `datasets`.
    root: str
    # Name of the dataset in the export's manifest.
    variant: str
    # The first so many training shards; validation is always whole.
    train_shards: int = Field(gt=0)
    endpoint: str


@dataclass(frozen=True)
class Export:
    """What a manifest says of one dataset, and the files to fetch: their names in the repository and here."""

    vocab_size: int
    val_documents: int
    val_tokens: int
    sidecar: bool
    files: dict[str, str]


def fetch_hub(hub: FetchHub, folder: Path, *, cache: Path | None = None) -> Export:
    """Fill `folder` with the shards and the tokenizer of an export, and with hub.json, which says what they are.

    All validation shards and byte sidecars are fetched, but only the first hub.train_shards training shards. `cache` is
    the library's cache folder, None for its default. Raises UserError if the manifest does not know the variant or has
    fewer shards, or if a file is missing or damaged.
    """
    repository = Repository(hub, cache)
    manifest = repository.file("manifest.json")
    try:
        export = _plan(json.loads(manifest.read_text(encoding="utf-8")), hub)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{hub.repository}: manifest.json is not understood ({error!r})") from None
    hashes: dict[str, str] = {}
    with Progress("fetch", len(export.files), unit="files") as progress:
        for remote, name in export.files.items():
            cached = repository.file(remote)
            link_or_copy(cached, folder / name)
            hashes[name] = _checksum(cached, "0" * 64)
            progress.update()
    about = {
        "repository": hub.repository,
        "revision": hub.revision,
        "variant": hub.variant,
        "vocab_size": export.vocab_size,
        "val_documents": export.val_documents,
        "val_tokens": export.val_tokens,
        "transform": "caseops" if export.sidecar else "none",
        "sha256": hashes,
    }
    write_atomic(folder / "hub.json", json.dumps(about, indent=2) + "\n")
    return export


def _plan(manifest: dict[str, Any], hub: FetchHub) -> Export:
    """The export that params.yaml asks for. Raises UserError if the manifest has no such export."""
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    if hub.variant not in datasets:
        raise UserError(
            f"params.yaml: fetch.variant: {hub.repository} has no {hub.variant}, only {', '.join(sorted(datasets))}"
        )
    dataset = datasets[hub.variant]
    stats = dataset["stats"]
    if hub.train_shards > stats["files_train"]:
        raise UserError(
            f"params.yaml: fetch.train_shards ({hub.train_shards}): {hub.variant} has {stats['files_train']} training "
            "shards"
        )
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    sidecar = bool(dataset.get("val_bytes_glob"))
    counts = {"val": stats["files_val"], "val_bytes": stats["files_val"] if sidecar else 0, "train": hub.train_shards}
    shards = [f"fineweb_{kind}_{index:06d}.bin" for kind, count in counts.items() for index in range(count)]
    return Export(
        vocab_size=dataset["vocab_size"],
        val_documents=stats["docs_val"],
        val_tokens=stats["tokens_val"],
        sidecar=sidecar,
        files={tokenizers[dataset["tokenizer_name"]]["model_path"]: "tokenizer.model"}
        | {f"datasets/{hub.variant}/{name}": name for name in shards},
    )


class Repository:
    """The files of one dataset repository at one revision."""

    def __init__(self, hub: FetchHub, cache: Path | None) -> None:
        """`cache` is the library's cache folder, None for its default.

        Raises UserError if the package huggingface_hub is not installed.
        """
        try:
            from huggingface_hub import errors, hf_hub_download
        except ImportError:
            raise UserError(
                "params.yaml: fetch.source = hub needs the package huggingface_hub (pip install huggingface_hub)"
            ) from None
        self._hf_hub_download, self._errors = hf_hub_download, errors
        self._hub = hub
        self._cache = cache

    def file(self, name: str) -> Path:
        """The path of a local copy of the file `name`, downloaded if necessary, whose checksum was verified.

        Raises UserError naming the file if neither hub nor cache has it, or if its checksum is not the hub's. In the
        second case the copy is removed from the cache.
        """
        cached = self._download(name)
        # In the documented layout of the cache snapshots/<commit>/<name> is a link to blobs/<checksum of the hub>.
        blob = cached.parent / os.readlink(cached) if cached.is_symlink() else cached
        found = _checksum(cached, blob.name)
        if found != blob.name:
            cached.unlink()
            blob.unlink(missing_ok=True)
            raise UserError(f"{self._where(name)}: checksum {found}, the hub promises {blob.name}; fetch it again")
        return cached

    def _download(self, name: str) -> Path:
        """The path of the file `name` in the cache. Raises UserError if it is not there and cannot be downloaded."""
        errors = self._errors
        try:
            return Path(
                self._hf_hub_download(
                    self._hub.repository,
                    f"{self._hub.root}/{name}",
                    repo_type="dataset",
                    revision=self._hub.revision,
                    endpoint=self._hub.endpoint,
                    cache_dir=self._cache,
                )
            )
        except errors.LocalEntryNotFoundError:
            raise UserError(
                f"{self._where(name)}: not in the cache, and {self._hub.endpoint} is out of reach"
            ) from None
        except (errors.HTTPError, errors.HFValidationError, OSError) as error:
            raise UserError(f"{self._where(name)}: {' '.join(str(error).split())}") from None

    def _where(self, name: str) -> str:
        return f"{self._hub.repository}@{self._hub.revision}, {self._hub.root}/{name}"


def _checksum(path: Path, like: str) -> str:
    """The file's checksum of the same kind as `like`, told apart by its length.

    The hub states the SHA-256 of large files, and of small ones the SHA-1 that git gives them.
    """
    if len(like) == 64:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def adopt_export(fetched: Path, folder: Path, settings: TokenizeSettings) -> dict[str, Any]:
    """Link the shards and the tokenizer of a fetched export into `folder`; return the content of meta.json.

    How many bytes the published text has before the tokenizer folds it is not known, so the entries `*_text_bytes` are
    null, and so is `dropped_train_documents`: nothing is dropped from finished shards. Raises UserError if the section
    `tokenize` disagrees with the export, if a file disagrees with its checksum, or if the validation shards disagree
    with their sidecars or with the manifest's counts.
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
    changed: dict[str, str] = {}
    if settings.scored_documents < about["val_documents"]:
        changed = cut_validation(folder, settings.scored_documents)
    pairs: list[Pair] = []
    if settings.fused_pairs:
        pairs, digests = fuse_shards(folder, settings.fused_pairs)
        changed |= digests
    if changed:
        counts = {split: _count(folder, split, settings.vocab_size) for split in counts}
    return {
        "vocab_size": settings.vocab_size,
        "transform": settings.transform,
        "fused_pairs": as_json(pairs),
        "source": {key: about[key] for key in ("repository", "revision", "variant")},
        "val_bytes": _validation_bytes(folder, settings),
        "held_out_documents": about["val_documents"],
        "dropped_train_documents": None,
        **{f"{split}_documents": documents for split, (documents, _) in counts.items()},
        **{f"{split}_tokens": tokens for split, (_, tokens) in counts.items()},
        **{f"{split}_text_bytes": None for split in counts},
        "compressed_val_bytes": {},
        "sha256": {
            name: changed.get(name, digest) for name, digest in about["sha256"].items() if (folder / name).exists()
        },
    }


def _require_agreement(about: dict[str, Any], settings: TokenizeSettings) -> None:
    """Raise UserError unless the section `tokenize` describes the export that hub.json is about."""
    for key in ("vocab_size", "val_documents", "transform"):
        if getattr(settings, key) != about[key]:
            raise UserError(f"params.yaml: tokenize.{key}: expected {about[key]}, as {about['variant']} has it")
    if settings.model is not None:
        raise UserError(
            f"params.yaml: tokenize.model: expected null, since {about['variant']} brings its own tokenizer"
        )


def _count(folder: Path, split: Any, vocab_size: int) -> tuple[int, int]:
    """How many documents (each begins with BOS) and how many tokens a split has."""
    shards = [open_shard(path, vocab_size=vocab_size) for path in shard_paths(folder, split)]
    return sum(int(np.count_nonzero(shard == BOS)) for shard in shards), sum(map(len, shards))


def _validation_bytes(folder: Path, settings: TokenizeSettings) -> int:
    """The bytes that all validation tokens stand for, by the sidecar if there is one, otherwise by the byte table."""
    if sidecars := open_sidecars(folder):
        return sum(int(sidecar.sum(dtype=np.int64)) for sidecar in sidecars)
    tokens = np.concatenate([open_shard(path, vocab_size=None) for path in shard_paths(folder, "val")])
    table = byte_table(folder / "tokenizer.model", settings.vocab_size)
    return int(table.count(tokens[:-1], tokens[1:]).sum(dtype=np.int64))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name in another folder, or copy it where the file system allows no second name."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
