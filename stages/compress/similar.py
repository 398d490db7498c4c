"""Rows that are like an earlier row of their matrix, stored as the difference.

The matrices of layers have no such rows. Tables have: tokens that never occur in training are all pushed the same way,
and their rows end up nearly equal.
"""

import numpy as np

# A difference is taken if it is this much smaller than the row, in mean magnitude: less would hardly pay for saying so.
WORTHWHILE = 0.85
# Rows compared at a time.
BLOCK = 512


def find_references(matrix: np.ndarray) -> np.ndarray:
    """For each row of int8 codes the earlier row that points most nearly the same way, uint16 (R,).

    0 stands for none, i for row i - 1. Matrices with more rows than that can name have none.
    """
    codes = matrix.astype(np.float32)
    codes /= np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1.0)
    nearest = np.zeros(len(matrix), np.int64)
    for start in range(0, len(matrix), BLOCK):
        cosines = codes[start : start + BLOCK] @ codes[: start + BLOCK].T
        # Raised above the zeros that tril leaves for the row itself and those behind it.
        nearest[start : start + BLOCK] = np.tril(cosines + 2.0, k=start - 1).argmax(axis=1)
    plain = matrix.astype(np.int16)
    difference = np.abs(plain - plain[nearest])
    useful = (difference.mean(axis=1) < WORTHWHILE * np.abs(plain).mean(axis=1)) & (difference.max(axis=1) <= 127)
    useful[0] = False
    if len(matrix) >= 2**16:
        useful[:] = False
    return np.where(useful, nearest + 1, 0).astype(np.uint16)


def subtract(matrix: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The int8 matrix with each row that has a reference less that row."""
    rows = np.flatnonzero(references)
    differences = matrix.copy()
    differences[rows] -= matrix[references[rows] - 1]
    return differences


def restore(differences: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The inverse. Raises ValueError if a row refers to one that is not before it, or codes do not fit int8."""
    rows = np.flatnonzero(references)
    if np.any(references[rows] > rows):
        raise ValueError("a row that refers to a later one")
    matrix = differences.astype(np.int16)
    for row in rows:
        matrix[row] += matrix[references[row] - 1]
        if matrix[row].min() < -128 or matrix[row].max() > 127:
            raise ValueError("codes beyond int8")
    return matrix.astype(np.int8)
