"""The documents file: one JSON object with `text` a line, plain or zstandard, in its final order.

Lines are told apart by LF alone and parsed one by one, so that a fault is told with its line number and a corpus of any
size passes through a few megabytes of memory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from stages.errors import UserError

# Some corpora are packed with windows up to 128 MiB (zstd --long=27); the format's limit costs nothing to allow.
MAX_WINDOW_BYTES = 2**31


def documents_path(folder: Path) -> Path:
    """The one documents file of a folder, docs.jsonl or docs.jsonl.zst. Raises UserError if there is none."""
    for name in ("docs.jsonl", "docs.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no docs.jsonl or docs.jsonl.zst; `python -m stages.fetch` makes it")


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[Iterator[bytes], BinaryIO]]:
    """The lines of a documents file, decompressed, and the file they come from (whose position tells the progress).

    Raises UserError if the file is missing or is not the zstandard stream that its name says.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected documents, one JSON object with `text` a line")
    with path.open("rb") as file:
        yield (_decompressed_lines(file, path) if path.suffix == ".zst" else file), file


def _decompressed_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines (without LF) of a zstandard file. zstandard's own reader would end quietly where the file was cut off."""
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
    """The text of one line. Raises UserError, beginning with `where` (file and line), if the line holds none."""
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
    """The texts of a documents file in order, from document number `start` on."""
    with open_lines(path) as (lines, _):
        for number, line in enumerate(lines):
            if number >= start:
                yield parse_text(line, f"{path}, line {number + 1}")
