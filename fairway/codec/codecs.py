"""Compressors of integer codes, by the name that params.yaml gives them (CODECS).

A codec takes a group of similar integer matrices at once. It must be able to read files that anyone may have written:
decoding makes exactly the matrices that it is asked for, never more, and raises ValueError if the stream does not hold
them.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from fairway.codec.byte_codecs import Brotli, ByteCodec, Lrzip, Lzma, Shuffled, Zstd
from fairway.codec.entropy_coder import RowColumnAns
from fairway.codec.trellis import TrellisAns

Result = TypeVar("Result")


def in_parallel(function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]) -> list[Result]:
    """The results of a function for each tuple of arguments, in order.

    They are computed in threads, which suffices because compressors let other Python threads run meanwhile.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


class Codec(Protocol):
    """A lossless compressor of a group of matrices."""

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""


class Serialized:
    """One byte for each code, row by row and matrix by matrix, through a compressor of bytes."""

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


# A matrix joins the piece before it until that piece has this many codes. Each further piece costs about 500 bytes and
# saves seconds, since pieces are packed in parallel.
PIECE_CODES = 2**22
# A matrix is tall if it has more than this many rows for each column. Tables of tokens are, matrices of layers are not.
TALL = 4
# Rows are ordered by all distances between them, and for this many rows those take a gigabyte.
MOST_ORDERED_ROWS = 2**14


class ColumnPieces:
    """One byte for each code, column by column, in pieces of a few matrices that are packed and unpacked in parallel.

    Where steps are proportional to the deviation of a row, all rows have codes of about the same size, but columns
    differ, and a compressor that reads column by column adapts to that (PR #1855). The rows of tall matrices are first
    put in an order in which each row is similar to the one before it. PR #1855 orders the rows of more matrices, but
    for those the order takes more bytes than it saves. Layout of the stream:

        bytes of the orders, bytes of each piece: u32 each | orders, u16 each, packed by Brotli | pieces

    A stream that begins like a file of lrzip is such a file as a whole, in the layout of Serialized: version 0.1.0
    wrote these.
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
        """The matrices of a piece, transposed, as they are stored."""
        return Serialized(self.inner).decode(data, [(columns, rows) for rows, columns in shapes])


def is_tall(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a matrix of this shape are stored in an order of their own."""
    rows, columns = shape
    return TALL * columns < rows <= MOST_ORDERED_ROWS


def row_order(matrix: np.ndarray) -> np.ndarray:
    """The order in which the rows of a matrix of int8 codes are stored, int64 (R,).

    A tall matrix begins with its first row; after each row comes the nearest of those that are left, by the sum of
    squared differences. Any other matrix keeps its order.
    """
    order = np.arange(len(matrix))
    if not is_tall(matrix.shape):
        return order
    codes = matrix.astype(np.float32)
    # Squared distances, but without the square of the row that they start from: it is the same for all candidates.
    distances = (-2 * codes) @ codes.T
    distances += np.square(codes).sum(axis=1)
    taken = np.zeros(len(matrix), np.float32)
    for i in range(1, len(matrix)):
        taken[order[i - 1]] = np.inf
        order[i] = np.argmin(distances[order[i - 1]] + taken)
    return order


def _unpack_places(data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """For each matrix the place at which each of its rows is stored. Raises ValueError if a row has no place."""
    lengths = [rows if is_tall((rows, columns)) else 0 for rows, columns in shapes]
    orders = np.frombuffer(Brotli().decode(data, 2 * sum(lengths)), "<u2")
    places = []
    for (rows, _), order in zip(shapes, np.split(orders, np.cumsum(lengths)[:-1]), strict=True):
        places.append(np.argsort(order) if len(order) else np.arange(rows))
        if len(order) and not np.array_equal(order[places[-1]], np.arange(rows)):
            raise ValueError("an order of rows that leaves one out")
    return places


def _pieces(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The pieces, each as the indices of its matrices."""
    starts = list(itertools.accumulate((rows * columns for rows, columns in shapes), initial=0))
    groups = itertools.groupby(range(len(shapes)), key=lambda i: starts[i] // PIECE_CODES)
    return [list(group) for _, group in groups]


def _split(data: bytes, parts: int) -> list[bytes]:
    """The parts of a stream that begins with their lengths. Raises ValueError unless these add up to its length."""
    lengths = np.frombuffer(data[: 4 * parts], "<u4").astype(np.int64)
    ends = 4 * parts + np.cumsum(lengths)
    if len(lengths) < parts or ends[-1] != len(data):
        raise ValueError("the pieces are not as long as they should be")
    return [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


CODECS: dict[str, Codec] = {
    "ans": RowColumnAns(),
    "trellis_ans": TrellisAns(),
    "brotli": Serialized(Brotli()),
    "brotli_shuffled": Serialized(Shuffled(Brotli())),
    "zstd": Serialized(Zstd()),
    "lzma": Serialized(Lzma()),
    "lrzip": ColumnPieces(Lrzip()),
}
