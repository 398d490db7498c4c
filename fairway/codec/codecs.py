"""Codes to bytes and back, by compressors of the name that params.yaml gives them.

A codec takes a group of similar integer matrices at once. Decoding is for files that anyone may have written: it makes
exactly what it is asked for, never more, and raises ValueError when that is not there.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fairway.codec.byte_codecs import Brotli, ByteCodec, Lrzip, Lzma, Shuffled, Zstd
from fairway.codec.entropy_coder import RowColumnAns


class Codec(Protocol):
    """A lossless compressor of groups of matrices."""

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""


class Serialized:
    """One byte a code, row by row, matrix by matrix, through a compressor of bytes."""

    def __init__(self, inner: ByteCodec) -> None:
        self.inner = inner

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""
        return self.inner.encode(b"".join(matrix.tobytes() for matrix in matrices))

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""
        sizes = [rows * columns for rows, columns in shapes]
        codes = np.frombuffer(self.inner.decode(data, sum(sizes)), np.int8)
        starts = itertools.accumulate(sizes, initial=0)
        return [codes[start : start + r * c].reshape(r, c) for start, (r, c) in zip(starts, shapes, strict=False)]


CODECS: dict[str, Codec] = {
    "ans": RowColumnAns(),
    "brotli": Serialized(Brotli()),
    "brotli_shuffled": Serialized(Shuffled(Brotli())),
    "zstd": Serialized(Zstd()),
    "lzma": Serialized(Lzma()),
    "lrzip": Serialized(Lrzip()),
}
