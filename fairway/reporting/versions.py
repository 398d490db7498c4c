"""Versions of the project as DVC has them, the workspace or a commit: their files, and which settings differ.

An experiment of `dvc exp run` is a commit too. Git has its params.yaml and what it tracks of results/, and its dvc.lock
names everything else, which lies in DVC's cache or remote unless it was never made there or has been collected.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dvc.api
from dvc.exceptions import DvcException
from dvc_data.index import DataIndexError
from fsspec.implementations.local import LocalFileSystem

from fairway.runtime.errors import UserError
from fairway.runtime.settings import read_mapping

# What DVC raises where there is no repository, no such commit, no such file, or nothing of it in the cache.
FAULTS = (DvcException, DataIndexError, OSError)


class Version:
    """The workspace (`rev` None), or the commit or experiment that `rev` names, under the name that a reader knows.

    Every method raises UserError, with the name, where there is no such commit or it does not have what is asked for.
    """

    def __init__(self, name: str, rev: str | None) -> None:
        self.name, self.rev = name, rev
        self._files = LocalFileSystem() if rev is None else dvc.api.DVCFileSystem(rev=rev)

    def settings(self, path: str = "params.yaml") -> dict[str, Any]:
        """The content of a file of settings, which must be a mapping."""
        return read_mapping(self.read(path), f"{self.name}: {path}")

    def commit(self) -> str:
        """The first seven digits of the commit, which must not be the workspace."""
        with self._needs("commit"):
            return str(self._files.repo.get_rev())[:7]

    def read(self, path: str) -> bytes:
        """A file's content."""
        with self._needs(path):
            content: bytes = self._files.read_bytes(path)
        return content

    def copy(self, path: str, folder: Path) -> None:
        """Copy a file to the same path in `folder`."""
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with self._needs(path):
            self._files.get_file(path, str(place))

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder."""
        with self._needs(folder):
            return sorted(Path(path).name for path in self._files.ls(folder, detail=False))

    @contextmanager
    def _needs(self, what: str) -> Iterator[None]:
        try:
            yield
        except FAULTS:
            where = "" if self.rev is None else " in git, nor in DVC's cache or remote"
            raise UserError(f"{self.name}: no {what}{where}") from None


@dataclass(frozen=True)
class Change:
    """A setting by the keys that lead to it, and its values as JSON; None where there is no such setting."""

    key: str
    before: str | None
    after: str | None


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The settings that differ between two contents of params.yaml, in the order of the second, then of the first."""
    old, new = dict(_flat(before)), dict(_flat(after))
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", json.dumps(value, ensure_ascii=False)
