"""Documents from files of one's own: which files a path means, how each kind is read, and the order of the documents.

A path is a folder, whose .txt and .md files are a document each, or a file of many documents: JSON lines, plain or
compressed, or Parquet. Everything that can be seen in the files' heads is checked before anything is written.

Files are often sorted, by date or by subject, and the first documents of all are those that validate. With
fetch.shuffle_seed the documents come in an order that has nothing to do with the files', so that these are a fair
sample.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import zstandard
from pydantic import BeforeValidator, Field, field_validator

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section
from fairway.tokens.documents import read_texts

# The folders that stages write. A stage deletes what stood there, so no input may lie in them.
PIPELINES_OWN = ("data/docs", "artifacts")
# A file of a folder is a document if its name ends so, in capitals or not.
DOCUMENTS = (".txt", ".md")
# Files of many documents, by the end of their names.
COLLECTIONS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")


def _listed(path: Any) -> Any:
    """A single path as a list of one."""
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
        raise ValueError(f"expected a path or a list of paths (found {path!r})")
    return paths


class FetchFile(Section):
    """Documents from folders and files of one's own."""

    source: Literal["file"]
    path: Annotated[list[str], BeforeValidator(_listed)]
    # The key of JSON lines, and the column of Parquet files, that holds the text. Folders do not need it.
    column: str = Field(min_length=1)
    # null leaves the documents in the order of the paths, and those of a folder in the order of their names.
    shuffle_seed: int | None

    @field_validator("path")
    @classmethod
    def _outside(cls, paths: list[str]) -> list[str]:
        for path in paths:
            for folder in PIPELINES_OWN:
                given, own = Path(path).resolve(), Path(folder).resolve()
                if given.is_relative_to(own):
                    raise ValueError(f"{path} lies in {folder}, which is the pipeline's own: keep documents elsewhere")
                if own.is_relative_to(given):
                    raise ValueError(f"{path} holds {folder}, which is the pipeline's own: name a folder in it")
        return paths


def fetch_own_text(fetch: FetchFile, folder: Path) -> int:
    """Write the documents of all paths to `folder` as a documents file, and return how many they are.

    The file is compressed if one of those it is made of is. Raises UserError as check_own_text does before anything is
    written, and after that if a later document is at fault.
    """
    files = check_own_text(fetch)
    lines: Iterator[bytes] = (
        json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n"
        for file in files
        for text in _texts(file, fetch.column)
    )
    if fetch.shuffle_seed is not None:
        lines = shuffled(lines, fetch.shuffle_seed, folder)
    if any(file.suffix in (".zst", ".gz", ".parquet") for file in files):
        with zstandard.open(folder / "docs.jsonl.zst", "wb") as out:
            return _write(lines, out)
    with (folder / "docs.jsonl").open("wb") as out:
        return _write(lines, out)


def _write(lines: Iterable[bytes], out: Any) -> int:
    """Write the lines to an open file; return their number."""
    written = 0
    for line in lines:
        out.write(line)
        written += 1
    return written


def check_own_text(fetch: FetchFile) -> list[Path]:
    """The files that fetch.path means, after a look at the first document of each.

    Raises UserError naming the file, and what was found and expected, if a path leads to no documents, if a file is not
    of the kind that its name says, or if its first document is at fault.
    """
    files = [file for path in fetch.path for file in _files(Path(path))]
    for file in files:
        if next(_texts(file, fetch.column), None) is None:
            raise UserError(f"{file}: no documents (fetch.path)")
    return files


def _files(path: Path) -> Sequence[Path]:
    """The file at `path`, or the documents of the folder there in the order of their names, but for hidden ones."""
    if path.is_dir():
        inside = {file.relative_to(path): file for file in path.rglob("*") if file.suffix.lower() in DOCUMENTS}
        shown = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        files = [inside[name] for name in sorted(shown, key=Path.as_posix) if inside[name].is_file()]
        if not files:
            raise UserError(f"{path}: no {' or '.join(DOCUMENTS)} file in this folder (fetch.path)")
        return files
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or folder (fetch.path); a queued experiment runs in a copy of what git tracks, so "
            "that other files need an absolute path there"
        )
    if not path.name.endswith(COLLECTIONS):
        kinds = ", ".join(COLLECTIONS)
        raise UserError(f"{path}: expected a folder of {' and '.join(DOCUMENTS)} files, or one of {kinds} (fetch.path)")
    return [path]


def _texts(file: Path, column: str) -> Iterator[str]:
    """The texts of a file of any kind. Raises UserError naming the file, and the place in it where there is one."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet_texts(file, column)
        elif file.name.endswith(COLLECTIONS):
            yield from read_texts(file, key=column)
        else:
            yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise UserError(f"{file}: expected UTF-8 text, found 0x{found:02X} as byte {error.start + 1}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


# How many documents are in memory at a time while a Parquet file is read.
PARQUET_ROWS = 1024


def _parquet_texts(file: Path, column: str) -> Iterator[str]:
    """The texts in the column of that name of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs the package pyarrow (pip install pyarrow)") from None
    rows = 0
    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                others = ", ".join(f"`{name}`" for name in schema.names)
                raise UserError(f"{file}: expected a column `{column}`, which fetch.column names; found {others}")
            kind = schema.field(column).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(f"{file}: expected a column `{column}` of strings, found {kind}")
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    if text is None:
                        raise UserError(f"{file}, row {rows}: `{column}` is null, expected a string")
                    yield text
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({' '.join(str(error).split())})") from None


def shuffled(lines: Iterable[bytes], seed: int, folder: Path) -> Iterator[bytes]:
    """The lines, each of which ends in LF, in an order that only their number and the seed decide.

    Meanwhile they lie in a nameless file on the disk of `folder`; memory holds 16 bytes for each. A line's key is a
    hash of the seed and its number, so that no version of a random number generator can change the order.
    """
    keys, starts = array("Q"), array("Q")
    with tempfile.TemporaryFile(dir=folder) as file:
        for number, line in enumerate(lines):
            key = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8)
            keys.append(int.from_bytes(key.digest(), "big"))
            starts.append(file.tell())
            file.write(line)
        for number in np.argsort(np.array(keys), kind="stable"):
            file.seek(starts[number])
            yield file.readline()
