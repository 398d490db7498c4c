"""Compressors of bytes, each a small class with `encode` and `decode`.

`decode` is told how many bytes to expect. It never makes more than that, however much a malicious stream may hold, and
it raises ValueError if the stream does not hold exactly that many.
"""

import lzma
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Protocol

import brotli
import numpy as np
import zstandard

from fairway.runtime.errors import UserError
from fairway.runtime.files import write_atomic

# What to do if the program lrzip is missing.
LRZIP_REMEDY = "apt-get install lrzip, or set compress.codec to ans, which packs as small and faster"


class ByteCodec(Protocol):
    """A lossless compressor."""

    def encode(self, data: bytes) -> bytes:
        """Compress."""

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""


class Brotli:
    """Brotli (RFC 7932) at quality 11; its largest standard window holds 16 MB of codes (PR #1172, #1855)."""

    def encode(self, data: bytes) -> bytes:
        """Compress."""
        return brotli.compress(data, quality=11, lgwin=24)

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes, or raise ValueError.

        It goes in steps and stops once there are too many bytes: a small stream can hold more than fits into memory.
        """
        decoder = brotli.Decompressor()
        parts: list[bytes] = []
        made, rest = 0, data
        try:
            while made <= size and not decoder.is_finished():
                part = decoder.process(rest, output_buffer_limit=min(size + 1 - made, 1 << 24))
                rest = b""
                if not part and not decoder.is_finished():
                    raise ValueError("the stream ends early")
                parts.append(part)
                made += len(part)
        except brotli.error as error:
            raise ValueError(str(error)) from None
        return _exactly(b"".join(parts), size)


class Zstd:
    """Zstandard (RFC 8878) at level 22."""

    def encode(self, data: bytes) -> bytes:
        """Compress."""
        return zstandard.ZstdCompressor(level=22).compress(data)

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""
        try:
            with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as reader:
                return _exactly(reader.read(size + 1), size)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None


class Lzma:
    """Raw LZMA2 at preset 6, as PR #1150 and #1488 used it, but without the header of their .xz files."""

    FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 6}]  # noqa: RUF012

    def encode(self, data: bytes) -> bytes:
        """Compress."""
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=self.FILTERS)

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=self.FILTERS)
        try:
            plain = _exactly(decoder.decompress(data, max_length=size + 1), size)
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from None
        if not decoder.eof:
            raise ValueError("the stream ends early")
        return plain


class Lrzip:
    """The lrzip program with its ZPAQ back end at level 9 (PR #1855).

    What lrzip writes depends on its number of threads, so each run has one. Callers start several runs at once instead.
    """

    # The bytes that every file of lrzip begins with.
    MAGIC = b"LRZI"

    def encode(self, data: bytes) -> bytes:
        """Compress. Raises UserError with what lrzip says if it fails."""
        try:
            return _lrzip(data, ["-z", "-L", "9", "-T"], largest=2 * len(data) + 2**16)
        except ValueError as error:
            raise UserError(str(error)) from None

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""
        return _exactly(_lrzip(data, ["-d"], largest=size), size)


class Shuffled:
    """Reorders float16 data for another codec: all low bytes first, then all high bytes (PR #1172, stride 2)."""

    def __init__(self, inner: ByteCodec) -> None:
        self.inner = inner

    def encode(self, data: bytes) -> bytes:
        """Compress."""
        return self.inner.encode(data[::2] + data[1::2])

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""
        shuffled = np.frombuffer(self.inner.decode(data, size), np.uint8)
        plain = np.empty_like(shuffled)
        plain[::2], plain[1::2] = shuffled[: (size + 1) // 2], shuffled[(size + 1) // 2 :]
        return plain.tobytes()


def _exactly(data: bytes, size: int) -> bytes:
    """The same data. Raises ValueError if it has another size."""
    if len(data) != size:
        raise ValueError(f"expected {size} bytes, the stream holds {'more' if len(data) > size else len(data)}")
    return data


# Each run of lrzip keeps one processor busy and takes 300 MB. More runs than processors would only take memory.
_FREE_PROCESSORS = threading.BoundedSemaphore(os.cpu_count() or 1)


def lrzip_program() -> str:
    """The path of the lrzip program. Raises UserError if it is not installed."""
    program = shutil.which("lrzip")
    if program is None:
        raise UserError(
            "params.yaml: compress.codec: lrzip is not installed; expected the program of the package lrzip: "
            + LRZIP_REMEDY
        )
    return program


def _lrzip(data: bytes, options: list[str], *, largest: int) -> bytes:
    """What lrzip makes of the data with these options. Waits until a processor is free.

    Raises ValueError with what lrzip says if it fails, and UserError if its folder of temporary files has no room.

    The kernel ends lrzip once it has written `largest` bytes, rounded up to the blocks of 512 bytes that ulimit counts
    in, because a malicious stream can hold any amount. A shell sets the limit and not this process between fork and
    exec, since Python code there can hang if the process has threads.
    """
    limited = ["sh", "-c", 'ulimit -f "$1" && shift && exec "$@"', "sh", str(-(-largest // 512)), lrzip_program()]
    with _FREE_PROCESSORS, tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        write_atomic(source, data)
        command = [*limited, *options, "-Q", "-p", "1", "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode or not target.is_file():
            said = " ".join((done.stderr + done.stdout).decode(errors="replace").split())
            raise ValueError(
                f"lrzip ended with status {done.returncode} and wrote no file: {said or 'no reason given'}"
            )
        return target.read_bytes()
