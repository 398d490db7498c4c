"""The documents file: how stages read it, and how one is made of a local file.

It holds one JSON object with `text` a line, plain or compressed with zstandard; its order decides everything after it.
Lines are separated by LF alone and parsed one by one, so that a fault is told with its line number and a corpus of any
size needs a few megabytes of memory.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard
from pydantic import field_validator

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section

# Some corpora are compressed with windows of up to 128 MiB (zstd --long=27), more than zstandard allows by default.
# Allowing the format's own limit costs nothing.
MAX_WINDOW_BYTES = 2**31


def documents_path(folder: Path) -> Path:
    """The documents file of a folder, docs.jsonl or docs.jsonl.zst. Raises UserError if there is none."""
    for name in ("docs.jsonl", "docs.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no docs.jsonl or docs.jsonl.zst; `python -m stages.fetch` makes it")


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[Iterator[bytes], BinaryIO]]:
    """The lines of a documents file, decompressed, and the open file, whose position tells how far the reading is.

    Raises UserError if the file is missing, or if its name ends in .zst and it is no whole zstandard stream.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected documents, one JSON object with `text` a line")
    with path.open("rb") as file:
        yield (_decompressed_lines(file, path) if path.suffix == ".zst" else file), file


def _decompressed_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines (without LF) of a zstandard file, which may consist of several frames.

    The frames are decompressed here, since the library's own reader ends without an error where a file was cut off.
    """
    library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = library.decompressobj()
    rest = b""
    try:
        while block := file.read(1 << 18):
            while block:
                frame = library.decompressobj() if frame.eof else frame
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstandard stream ({error})") from None
    if not frame.eof:
        raise UserError(f"{path}: damaged zstandard stream (it ends inside a frame)")
    if rest:
        yield rest


def parse_text(line: bytes, where: str) -> str:
    """The text of one line. Raises UserError if the line holds none; `where` (file and line) begins its message."""
    try:
        document = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not JSON") from None
    if not isinstance(document, dict) or "text" not in document:
        raise UserError(f"{where}: expected an object with the key `text`")
    text = document["text"]
    if not isinstance(text, str):
        raise UserError(f"{where}: `text` is {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: `text` has a lone surrogate, which no UTF-8 text can hold") from None
    return text


def read_texts(path: Path, *, start: int = 0) -> Iterator[str]:
    """The texts of a documents file in order, from document number `start` on, counted from 0.

    Raises UserError naming the file, and the line where there is one, if it holds anything but documents.
    """
    with open_lines(path) as (lines, _):
        for number, line in enumerate(lines):
            if number >= start:
                yield parse_text(line, f"{path}, line {number + 1}")


# The folders that stages write. A stage deletes what stood there, so no input may lie in them.
PIPELINES_OWN = ("data/docs", "artifacts")


class FetchFile(Section):
    """Documents from a local JSONL, JSONL.zst or Parquet file: one object with `text` per line, or a column `text`."""

    source: Literal["file"]
    path: str

    @field_validator("path")
    @classmethod
    def _outside(cls, path: str) -> str:
        for folder in PIPELINES_OWN:
            if Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"{path} lies in {folder}, which is the pipeline's own: keep the documents elsewhere")
        return path


def fetch_file(source: Path, folder: Path) -> int:
    """Write the documents of a .jsonl, .jsonl.zst or .parquet file to `folder`, in their order; return their number.

    JSON lines are checked and copied unchanged; the column `text` of a Parquet file becomes docs.jsonl.zst. Raises
    UserError naming the file, and the line where there is one, if it holds anything but documents, or none.
    """
    if source.suffix == ".parquet":
        documents = _convert_parquet(source, folder / "docs.jsonl.zst")
    elif suffix := next((suffix for suffix in (".jsonl", ".jsonl.zst") if source.name.endswith(suffix)), None):
        documents = sum(1 for _ in read_texts(source))
        shutil.copyfile(source, folder / f"docs{suffix}")
    else:
        raise UserError(f"{source}: expected a .jsonl, .jsonl.zst or .parquet file (fetch.path)")
    if not documents:
        raise UserError(f"{source}: no documents (fetch.path)")
    return documents


# How many documents are in memory at a time while a Parquet file is read.
PARQUET_ROWS = 1024


def _convert_parquet(source: Path, target: Path) -> int:
    """Write the column `text` of a Parquet file as compressed JSON lines; return the number of rows."""
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError:
        raise UserError(f"{source}: reading Parquet needs the package pyarrow (pip install pyarrow)") from None
    if not source.is_file():
        raise UserError(f"{source}: no such file (fetch.path)")
    rows = 0
    try:
        with parquet.ParquetFile(source) as file, zstandard.open(target, "wt", encoding="utf-8", newline="\n") as out:
            kind = file.schema_arrow.field("text").type if "text" in file.schema_arrow.names else None
            if kind is None or not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(f"{source}: expected a column `text` of strings, found {kind or 'none'}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    if text is None:
                        raise UserError(f"{source}, row {rows}: `text` is null, expected a string")
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    return rows
