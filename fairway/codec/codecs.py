"""Codes to bytes and back, by compressors of the name that params.yaml gives them.

A codec takes a group of similar integer matrices at once. Decoding is for files that anyone may have written: it makes
exactly what it is asked for, never more, and raises ValueError when that is not there.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from fairway.codec.byte_codecs import Brotli, ByteCodec, Lrzip, Lzma, Shuffled, Zstd
from fairway.codec.entropy_coder import RowColumnAns

Result = TypeVar("Result")


def in_parallel(function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]) -> list[Result]:
    """The results for each tuple of arguments, computed in threads: compressors let other threads run meanwhile."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


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


# A matrix joins the piece before it until that has so many codes. A piece more costs 500 bytes and saves seconds.
PIECE_CODES = 2**22
# A matrix is tall if it has more rows than so many times its columns: tables of tokens are, matrices of layers are not.
TALL = 4
# The distances between all rows of a matrix of this many take a gigabyte.
MOST_ORDERED_ROWS = 2**14


class ColumnPieces:
    """One byte a code, column by column, in pieces of a few matrices that are packed, and unpacked, in parallel.

    Steps in proportion to a row's deviation make rows alike but leave columns of different size, and a compressor that
    reads column by column adapts to that (PR #1855). Rows of tall matrices are first put in an order in which each is
    like the one before. PR #1855 orders more matrices, of which the orders cost more than they save. Layout:

        bytes of the orders, bytes of each piece: u32 each | orders, u16 each, packed by Brotli | pieces

    A stream that begins like a file of lrzip is one, with the layout of Serialized, as version 0.1.0 wrote it.
    """

    def __init__(self, inner: ByteCodec) -> None:
        self.inner = inner

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""
        orders = [row_order(matrix) for matrix in matrices]
        columns = [matrix[order].T.tobytes() for matrix, order in zip(matrices, orders, strict=True)]
        texts = [b"".join(columns[i] for i in piece) for piece in _pieces([matrix.shape for matrix in matrices])]
        told = [order.astype("<u2") for order, matrix in zip(orders, matrices, strict=True) if is_tall(matrix.shape)]
        packed_orders = Brotli().encode(b"".join(order.tobytes() for order in told))
        streams = [packed_orders, *in_parallel(self.inner.encode, zip(texts))]
        return np.array([len(stream) for stream in streams], "<u4").tobytes() + b"".join(streams)

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""
        if data.startswith(Lrzip.MAGIC):
            return Serialized(self.inner).decode(data, shapes)
        pieces = [[shapes[i] for i in piece] for piece in _pieces(shapes)]
        packed_orders, *streams = _split(data, 1 + len(pieces))
        places = _unpack_places(packed_orders, shapes)
        matrices = itertools.chain.from_iterable(in_parallel(self._decode_piece, zip(streams, pieces, strict=True)))
        return [matrix.T[place] for matrix, place in zip(matrices, places, strict=True)]

    def _decode_piece(self, data: bytes, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
        """The matrices of a piece, columns as rows."""
        return Serialized(self.inner).decode(data, [(columns, rows) for rows, columns in shapes])


def is_tall(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a matrix of this shape are stored in an order of their own."""
    rows, columns = shape
    return TALL * columns < rows <= MOST_ORDERED_ROWS


def row_order(matrix: np.ndarray) -> np.ndarray:
    """The order in which rows of int8 codes are stored, int64 (R,): of a tall matrix the first row, and from each on
    the nearest of those that are left, by the sum of squared differences."""
    order = np.arange(len(matrix))
    if not is_tall(matrix.shape):
        return order
    codes = matrix.astype(np.float32)
    # Less the square of the row before, which is the same for all rows that may come next.
    distances = (-2 * codes) @ codes.T
    distances += np.square(codes).sum(axis=1)
    taken = np.zeros(len(matrix), np.float32)
    for i in range(1, len(matrix)):
        taken[order[i - 1]] = np.inf
        order[i] = np.argmin(distances[order[i - 1]] + taken)
    return order


def _unpack_places(data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """For each matrix, where each of its rows is stored. Raises ValueError if a row is stored nowhere."""
    lengths = [rows if is_tall((rows, columns)) else 0 for rows, columns in shapes]
    orders = np.frombuffer(Brotli().decode(data, 2 * sum(lengths)), "<u2")
    places = []
    for (rows, _), order in zip(shapes, np.split(orders, np.cumsum(lengths)[:-1]), strict=True):
        places.append(np.argsort(order) if len(order) else np.arange(rows))
        if len(order) and not np.array_equal(order[places[-1]], np.arange(rows)):
            raise ValueError("an order of rows that leaves one out")
    return places


def _pieces(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Which matrices, by their number, make up each piece."""
    starts = list(itertools.accumulate((rows * columns for rows, columns in shapes), initial=0))
    groups = itertools.groupby(range(len(shapes)), key=lambda i: starts[i] // PIECE_CODES)
    return [list(group) for _, group in groups]


def _split(data: bytes, parts: int) -> list[bytes]:
    """The parts of a stream that begins with their lengths. Raises ValueError if they do not add up to the rest."""
    lengths = np.frombuffer(data[: 4 * parts], "<u4").astype(np.int64)
    ends = 4 * parts + np.cumsum(lengths)
    if len(lengths) < parts or ends[-1] != len(data):
        raise ValueError("the pieces are not as long as they should be")
    return [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


CODECS: dict[str, Codec] = {
    "ans": RowColumnAns(),
    "brotli": Serialized(Brotli()),
    "brotli_shuffled": Serialized(Shuffled(Brotli())),
    "zstd": Serialized(Zstd()),
    "lzma": Serialized(Lzma()),
    "lrzip": ColumnPieces(Lrzip()),
}
