"""A published export: token shards, tokenizer and manifest from a Hugging Face dataset repository.

Everything goes through huggingface_hub's own cache: what lies there whole is not fetched again (a killed run goes on
with the file it was at, a cut connection within the file), and without a network a complete cache is enough. The
library checks sizes only; here each file is checked against the hub's checksum as well. Source:
cached_challenge_fineweb.py of the challenge, and PR #1729's for byte sidecars.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.files import write_atomic
from stages.params import FetchHub
from stages.progress import Progress


class Repository:
    """The files of one dataset repository at one revision."""

    def __init__(self, hub: FetchHub, cache: Path | None) -> None:
        """`cache`: the library's cache folder, None for its default. Raises UserError without huggingface_hub."""
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
        """A checked local copy of the file `name`.

        Raises UserError naming the file if neither hub nor cache has it or its checksum is another; in the second case
        the copy is removed from the cache.
        """
        cached = self._download(name)
        # The cache's documented layout: snapshots/<commit>/<name> links to blobs/<checksum of the hub>.
        blob = cached.parent / os.readlink(cached) if cached.is_symlink() else cached
        found = _checksum(cached, blob.name)
        if found != blob.name:
            cached.unlink()
            blob.unlink(missing_ok=True)
            raise UserError(f"{self._where(name)}: checksum {found}, the hub promises {blob.name}; fetch it again")
        return cached

    def _download(self, name: str) -> Path:
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
    """The file's checksum of the kind that `like` is: SHA-256 (large files) or git's SHA-1 (small ones)."""
    if len(like) == 64:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Export:
    """One dataset of a manifest: what it says of itself, and the files wanted of it (remote name to local name)."""

    vocab_size: int
    val_documents: int
    val_tokens: int
    sidecar: bool
    files: dict[str, str]


def fetch_hub(hub: FetchHub, folder: Path, *, cache: Path | None = None) -> Export:
    """Fill `folder` with an export's shards and tokenizer.model, and hub.json, which says what they are.

    All validation shards (and byte sidecars), the first hub.train_shards training shards. Raises UserError if the
    manifest does not know the variant or has fewer shards, or if a file cannot be had whole.
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


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
