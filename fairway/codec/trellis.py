"""Codes that follow a trellis: half of each code's lowest bit is known to whoever knows the codes above it.

A grid twice as fine would take one bit more a weight. Trellis-coded quantization takes such a grid, but of two
neighbouring codes it allows only one at each place: in every column a state tells the parity of a code, and the codes
above tell the state. So code = 2·index + parity, and only the index, a number as small as a code of the coarse grid, is
stored. The quantizer chooses the nearest of all columns that the trellis allows (quantization/trellis_search.py). With
the entropy coder of this project that is worth 0.15 to 0.16 bit a weight at equal error (docs/log.md, 2026-11-27).

A state has three bits. Its lowest one is the parity of the code; the next state depends on that and on the lowest bit
of the index. Such a pair of bits says in which of four cosets (code mod 4) the code lies.

Method: trellis-coded quantization (Marcellin and Fischer 1990) with an entropy coder behind it (Fischer and Wang 1992),
and Ungerboeck's code of 8 states with the parity-check polynomials 13 and 4 (octal). Legend: R rows, C columns.
"""

from collections.abc import Sequence

import numpy as np

from fairway.codec.entropy_coder import RowColumnAns

STATES = 8
# The polynomials without their lowest bit, which is the state's own.
FROM_PARITY, FROM_INDEX = 0o13 >> 1, 0o4 >> 1


def next_states() -> np.ndarray:
    """The state that follows each state and each lowest bit of the index, int8 (STATES, 2)."""
    state = np.arange(STATES, dtype=np.int8)[:, None]
    bit = np.arange(2, dtype=np.int8)
    return (state >> 1) ^ (state & 1) * np.int8(FROM_PARITY) ^ bit * np.int8(FROM_INDEX)


def codes_of(indices: np.ndarray) -> np.ndarray:
    """The codes int8 (R, C) of indices int8 (R, C). Raises ValueError if a code is none of int8."""
    if indices.size and (int(indices.min()) < -64 or int(indices.max()) > 63):
        raise ValueError("an index of a trellis beyond -64 ... 63")
    following, codes = next_states(), np.empty_like(indices)
    state = np.zeros(indices.shape[1], np.int8)
    for row, index in enumerate(indices):
        codes[row] = 2 * index + (state & 1)
        state = following[state, index & 1]
    return codes


def follow(codes: np.ndarray) -> bool:
    """Whether codes int8 (R, C) are what their indices tell."""
    return np.array_equal(codes_of(codes >> 1), codes)


class TrellisAns:
    """Codec of codes that follow the trellis: their indices by RowColumnAns. Other matrices are packed as they are.

    The stream begins with a byte for each matrix, which says whether its indices stand there.
    """

    def encode(self, matrices: Sequence[np.ndarray]) -> bytes:
        """Compress int8 matrices."""
        told = bytes(map(follow, matrices))
        return told + RowColumnAns().encode([matrix >> by for matrix, by in zip(matrices, told, strict=True)])

    def decode(self, data: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int8 matrices of these shapes. Raises ValueError if that is not what `data` holds."""
        told = data[: len(shapes)]
        if len(told) < len(shapes) or max(told, default=0) > 1:
            raise ValueError("neither codes nor indices of a trellis")
        matrices = RowColumnAns().decode(data[len(shapes) :], shapes)
        return [codes_of(matrix) if by else matrix for matrix, by in zip(matrices, told, strict=True)]
