"""The documents file: how stages read it, and how a document is recognised wherever it stands.

It holds one JSON object with `text` a line, plain or compressed with zstandard; its order decides everything after it.
Files of one's own, which the stage fetch makes it of, may also be compressed with gzip, and keep their text under
another key. Lines are separated by LF alone and parsed one by one, so that a fault is told with its line number and a
corpus of any size needs a few megabytes of memory.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from fairway.runtime.errors import UserError

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

    Raises UserError if the file is missing, or if its name ends in .zst or .gz and it is no whole stream of that kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected documents, one JSON object a line")
    with path.open("rb") as file:
        unpacked = {".zst": _zstandard_lines, ".gz": _gzip_lines}.get(path.suffix)
        yield (unpacked(file, path) if unpacked else file), file


def _gzip_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a gzip file, which may consist of several members."""
    try:
        with gzip.open(file) as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip stream ({error})") from None


def _zstandard_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
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


def parse_text(line: bytes, where: str, key: str = "text") -> str:
    """The text under `key` of a line's JSON object. Raises UserError if there is none.

    `where` (file and line) begins the message of the error.
    """
    try:
        # Python reads no whole number of more than 4300 digits. None of them is needed here: 0 stands for each.
        document = json.loads(line, parse_int=lambda digits: 0)
    except ValueError:
        raise UserError(f"{where}: not JSON") from None
    except RecursionError:
        raise UserError(f"{where}: more brackets inside one another than Python's JSON reader takes") from None
    if not isinstance(document, dict):
        raise UserError(f"{where}: expected an object with the key `{key}`, found {type(document).__name__}")
    if key not in document:
        found = ", ".join(f"`{name}`" for name in document) or "no keys"
        raise UserError(f"{where}: expected an object with the key `{key}`, which fetch.column names; found {found}")
    text = document[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: `{key}` is {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: `{key}` has a lone surrogate, which no UTF-8 text can hold") from None
    return text


def read_texts(path: Path, *, start: int = 0, key: str = "text") -> Iterator[str]:
    """The texts of a documents file in order, from document number `start` on, counted from 0.

    Raises UserError naming the file, and the line where there is one, if it holds anything but documents with `key`.
    """
    with open_lines(path) as (lines, _):
        for number, line in enumerate(lines):
            if number >= start:
                yield parse_text(line, f"{path}, line {number + 1}", key)


def text_hash(text: str) -> bytes:
    """16 bytes that are the same for equal texts and, but for chance far below one in 2**64, for no others."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
