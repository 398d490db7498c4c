"""The header of a model file: a table of its tensors with the length of every stream, and the checks on it."""

import math

from pydantic import Field

from fairway.codec.codecs import CODECS
from fairway.codec.codes import TensorClass
from fairway.model.config import ModelConfig
from fairway.runtime.settings import Section

# The most numbers that a file may claim: far above any network that fits 16 MB, far below what a laptop can hold.
MAX_VALUES = 2**28


class Correction(Section):
    """The low-rank correction of a matrix: its rank, and the number of scales of its second factor."""

    rank: int = Field(gt=0)
    scales: int = Field(gt=0)


class Entry(Section):
    """A tensor of the table. `bits` are those of a code, or 16 for a float16 tensor."""

    name: str
    shape: list[int]
    bits: int = Field(ge=2, le=16)
    correction: Correction | None = None

    @property
    def values(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def scale_counts(self) -> list[int]:
        """How many float16 scales a matrix has: for its rows, then for each of the two factors of its correction."""
        return [self.shape[0], *([1, self.correction.scales] if self.correction else [])]

    @property
    def factor_shapes(self) -> list[tuple[int, int]]:
        """The shapes of the two factors of a matrix's correction; empty if it has none."""
        rows, columns = self.shape
        return [(rows, self.correction.rank), (self.correction.rank, columns)] if self.correction else []


class Group(Section):
    """The matrices of one class, and the bytes of their streams: codes, scales, and codes of their corrections."""

    kind: TensorClass
    matrices: list[Entry] = Field(min_length=1)
    codes_bytes: int = Field(ge=0)
    scales_bytes: int = Field(ge=0)
    factors_bytes: int = Field(ge=0)

    @property
    def stream_bytes(self) -> int:
        """The bytes of all its streams."""
        return self.codes_bytes + self.scales_bytes + self.factors_bytes


class Header(Section):
    """What the file holds, in the order of its streams, with their lengths."""

    model: ModelConfig
    codec: str
    groups: list[Group]
    floats: list[Entry]
    floats_bytes: int = Field(ge=0)


def check_table(header: Header, stream_bytes: int) -> None:
    """Raise ValueError unless names are unique, shapes plausible, and streams together as long as `stream_bytes`."""
    matrices = [entry for group in header.groups for entry in group.matrices]
    entries = matrices + header.floats
    if header.codec not in CODECS:
        raise ValueError(f"unknown codec {header.codec[:40]!r}, expected one of {', '.join(CODECS)}")
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("a tensor occurs twice")
    if any(len(entry.shape) > 8 or min(entry.shape, default=1) < 1 for entry in entries):
        raise ValueError("impossible tensor shape")
    if sum(entry.values for entry in entries) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} weights")
    for entry in matrices:
        _check_matrix(entry)
    listed = sum(group.stream_bytes for group in header.groups) + header.floats_bytes
    if listed != stream_bytes:
        raise ValueError(f"the streams should take {listed} bytes, {stream_bytes} are there")


def _check_matrix(entry: Entry) -> None:
    if len(entry.shape) != 2 or entry.bits > 8:
        raise ValueError("codes that are not a matrix of at most 8 bits")
    if entry.correction is None:
        return
    rank, scales = entry.correction.rank, entry.correction.scales
    if rank > min(entry.shape) or rank * entry.shape[1] % scales:
        raise ValueError("impossible correction of a matrix")
