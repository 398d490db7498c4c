"""An entropy coder for integer codes of weights: a scale for each row and each column, a histogram for each scale.

To a dictionary coder codes are noise. All that can be known about a code beforehand is how large it is likely to be,
and that is taken to be the product of a scale of its row and a scale of its column. Both are stored as indices on a
grid of logarithms. The sum of the two indices is the code's bucket, and each bucket of a group of matrices has its own
histogram of codes, so that nothing is assumed about the shape of the distribution or of its tails. The codes are then
written bucket by bucket by an asymmetric numeral system (ANS), which needs only a fraction of a percent more than the
entropy of the histograms.

Before all this, a row that is similar to an earlier row of its matrix is replaced by the difference of the two. The
matrices of layers have no such rows, but tables do: tokens that never occur in training are all pushed the same way,
and their rows end up nearly equal.

    buckets u8 | lowest, highest code i8 | bytes of the packed model u32 | model | ANS words, u32 each

The model is packed by Brotli. It holds the references of rows (u16) of all matrices, then their row indices (u8), then
their column indices (u8), and at last the histograms as logarithms (u8).

Method: ANS (arXiv:1311.2540) by the constriction library. Legend: R rows, C columns, K buckets, S symbols.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import constriction
import numpy as np

from fairway.codec.byte_codecs import Brotli

# constriction's class Categorical. The library declares no types.
Distribution = Any

PREFIX = struct.Struct("<BbbI")
# The step of the grid in units of the natural logarithm. With a finer grid, an index that some 500 codes share would
# cost more than it saves.
LOG_STEP = 0.1
MAX_BUCKETS = 128
# A scale is a mean magnitude. This is the smallest, and that of a row of zeros.
SMALLEST_MAGNITUDE = 0.02
# Histograms are stored as logarithms of counts: 255 for the largest count of the bucket, and 16 less for half of it.
# MANTISSAS are the powers of two between one octave and the next, times 4096 and rounded.
OCTAVE = 16
MANTISSAS = [round(2.0 ** (step / OCTAVE + 12)) for step in range(OCTAVE)]


class RowColumnAns:
    """A codec of groups of integer matrices (codecs.py). It decodes by integers alone, alike on every machine."""

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""
        references = [find_references(matrix) for matrix in matrices]
        matrices = [subtract(matrix, rows) for matrix, rows in zip(matrices, references, strict=True)]
        lowest = min(126, *(int(matrix.min()) for matrix in matrices))
        highest = max(lowest + 1, *(int(matrix.max()) for matrix in matrices))
        indices = [_scale_indices(matrix) for matrix in matrices]
        rows, columns = zip(*indices, strict=True)
        histograms_KS = _logarithms(_counts(matrices, indices, lowest, highest))
        parts = [*(part.astype("<u2") for part in references), *rows, *columns, histograms_KS]
        model = Brotli().encode(b"".join(part.tobytes() for part in parts))
        words = _encode_words(matrices, indices, _distributions(histograms_KS), lowest)
        return PREFIX.pack(len(histograms_KS), lowest, highest, len(model)) + model + words

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""
        if len(data) < PREFIX.size:
            raise ValueError("the stream ends early")
        buckets, lowest, highest, model_bytes = PREFIX.unpack_from(data)
        start, n = PREFIX.size + model_bytes, len(shapes)
        if lowest >= highest or start > len(data) or (len(data) - start) % 4:
            raise ValueError("impossible model of the codes")
        rows, columns = zip(*shapes, strict=True)
        lengths = [*(2 * r for r in rows), *rows, *columns, buckets * (highest - lowest + 1)]
        model = np.frombuffer(Brotli().decode(data[PREFIX.size : start], sum(lengths)), np.uint8)
        *parts, histograms = np.split(model, np.cumsum(lengths[:-1]))
        indices = list(zip(parts[n : 2 * n], parts[2 * n :], strict=True))
        distributions = _distributions(histograms.reshape(buckets, -1))
        differences = _decode_words(data[start:], indices, distributions, lowest)
        return [restore(matrix, part.view("<u2")) for matrix, part in zip(differences, parts[:n], strict=True)]


# The row indices and the column indices of one matrix, uint8 (R,) and (C,).
Indices = tuple[np.ndarray, np.ndarray]


def _scale_indices(matrix: np.ndarray) -> Indices:
    """The grid indices of a matrix, such that |code| is about SMALLEST_MAGNITUDE · exp(LOG_STEP · (row + column))."""
    magnitude = np.abs(matrix.astype(np.float32))
    row_scale, column_scale = np.ones(len(matrix), np.float32), np.ones(matrix.shape[1], np.float32)
    for _ in range(4):
        row_scale = np.maximum((magnitude / column_scale).mean(axis=1), SMALLEST_MAGNITUDE)
        row_scale /= np.median(row_scale)
        column_scale = np.maximum((magnitude / row_scale[:, None]).mean(axis=0), SMALLEST_MAGNITUDE)
    middle = np.median(column_scale)
    rows, columns = _on_grid(row_scale), _on_grid(column_scale / middle)
    columns += int(np.rint(np.log(middle / SMALLEST_MAGNITUDE) / LOG_STEP)) + rows.min()
    return (rows - rows.min()).clip(0, 255).astype(np.uint8), columns.clip(0, 255).astype(np.uint8)


def _on_grid(scale: np.ndarray) -> np.ndarray:
    """The place of scales on the grid, in steps from a scale of 1, int64.

    A fraction of a step is rounded up from 0.7 on, because a small difference from 1 is mostly chance.
    """
    steps = np.log(scale) / LOG_STEP
    return (np.sign(steps) * np.floor(np.abs(steps) + 0.3)).astype(np.int64)


def _buckets(rows: np.ndarray, columns: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of every code, uint8 (R·C,)."""
    sums = rows[:, None].astype(np.uint16) + columns
    return np.minimum(sums, buckets - 1).astype(np.uint8).ravel()


def _counts(matrices: Sequence[np.ndarray], indices: Sequence[Indices], lowest: int, highest: int) -> np.ndarray:
    """How often each symbol occurs in each bucket, int64 (K, S)."""
    buckets = min(MAX_BUCKETS, 1 + max(int(rows.max()) + int(columns.max()) for rows, columns in indices))
    symbols = highest - lowest + 1
    counts = np.zeros(buckets * symbols, np.int64)
    for matrix, (rows, columns) in zip(matrices, indices, strict=True):
        cells = _buckets(rows, columns, buckets).astype(np.int64) * symbols + matrix.ravel() - lowest
        counts += np.bincount(cells, minlength=len(counts))
    return counts.reshape(buckets, symbols)


def _logarithms(counts_KS: np.ndarray) -> np.ndarray:
    """Counts as logarithms, uint8 (K, S): 0 for none, 255 for the bucket's largest, OCTAVE less for each halving."""
    largest_K1 = np.maximum(counts_KS.max(axis=1, keepdims=True), 1)
    steps = np.rint(OCTAVE * np.log2(largest_K1 / np.maximum(counts_KS, 1)))
    return np.where(counts_KS > 0, (255 - steps).clip(1, 255), 0).astype(np.uint8)


def _distributions(histograms_KS: np.ndarray) -> list[Distribution | None]:
    """The distribution over symbols of each bucket; None for a bucket without symbols."""
    exponents, steps = np.divmod(histograms_KS.astype(np.int64), OCTAVE)
    weights_KS = np.where(histograms_KS > 0, np.array(MANTISSAS)[steps] << exponents, 0).astype(np.float64)
    return [
        constriction.stream.model.Categorical(weights, perfect=False) if weights.any() else None
        for weights in weights_KS
    ]


def _runs(indices: Indices, buckets: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each bucket that occurs in a matrix with the positions (n,) of its codes, in the order of decoding."""
    bucket = _buckets(*indices, buckets)
    order = np.argsort(bucket, kind="stable")
    counts = np.bincount(bucket, minlength=buckets)
    yield from ((k, run) for k, run in enumerate(np.split(order, np.cumsum(counts[:-1]))) if len(run))


def _encode_words(
    matrices: Sequence[np.ndarray], indices: Sequence[Indices], distributions: list[Distribution | None], lowest: int
) -> bytes:
    """The ANS words. They are a stack: what is decoded first is encoded last."""
    coder = constriction.stream.stack.AnsCoder()
    for matrix, scales in reversed(list(zip(matrices, indices, strict=True))):
        symbols = matrix.ravel().astype(np.int32) - lowest
        for k, run in reversed(list(_runs(scales, len(distributions)))):
            coder.encode_reverse(symbols[run], distributions[k])
    return coder.get_compressed().astype("<u4").tobytes()


def _decode_words(
    words: bytes, indices: Sequence[Indices], distributions: list[Distribution | None], lowest: int
) -> list[np.ndarray]:
    """The matrices that the words hold. Raises ValueError unless they hold exactly these."""
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    matrices = []
    for rows, columns in indices:
        codes = np.empty(len(rows) * len(columns), np.int8)
        for k, run in _runs((rows, columns), len(distributions)):
            if distributions[k] is None:
                raise ValueError("a code without a histogram")
            codes[run] = coder.decode(distributions[k], len(run)) + lowest
        matrices.append(codes.reshape(len(rows), len(columns)))
    if not coder.is_empty():
        raise ValueError("more codes than there are weights")
    return matrices


# A row is replaced by a difference whose mean magnitude is below this share of the row's own. A difference that is
# hardly smaller would not pay for the reference.
WORTHWHILE = 0.85
# How many rows are compared with all earlier ones at a time.
BLOCK = 512


def find_references(matrix: np.ndarray) -> np.ndarray:
    """For each row of int8 codes the earlier row that points most nearly the same way, uint16 (R,).

    0 stands for no row and i for row i - 1. A matrix of 65,536 rows or more has no references, because uint16 could not
    name all of its rows.
    """
    if len(matrix) >= 2**16:
        return np.zeros(len(matrix), np.uint16)
    codes = matrix.astype(np.float32)
    codes /= np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1.0)
    nearest = np.zeros(len(matrix), np.int64)
    for start in range(0, len(matrix), BLOCK):
        cosines = codes[start : start + BLOCK] @ codes[: start + BLOCK].T
        # Adding 2 raises every cosine above the zeros that tril puts for the row itself and for later rows.
        nearest[start : start + BLOCK] = np.tril(cosines + 2.0, k=start - 1).argmax(axis=1)
    plain = matrix.astype(np.int16)
    difference = np.abs(plain - plain[nearest])
    useful = (difference.mean(axis=1) < WORTHWHILE * np.abs(plain).mean(axis=1)) & (difference.max(axis=1) <= 127)
    useful[0] = False
    return np.where(useful, nearest + 1, 0).astype(np.uint16)


def subtract(matrix: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The int8 matrix in which the row that it refers to is subtracted from each row with a reference."""
    rows = np.flatnonzero(references)
    differences = matrix.copy()
    differences[rows] -= matrix[references[rows] - 1]
    return differences


def restore(differences: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The inverse of subtract. Raises ValueError if a row refers to one not before it, or if codes do not fit int8."""
    rows = np.flatnonzero(references)
    if np.any(references[rows] > rows):
        raise ValueError("a row that refers to a later one")
    matrix = differences.astype(np.int16)
    for row in rows:
        matrix[row] += matrix[references[row] - 1]
        if matrix[row].min() < -128 or matrix[row].max() > 127:
            raise ValueError("codes beyond int8")
    return matrix.astype(np.int8)
