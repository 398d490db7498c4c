"""The challenge's shard files: a header of 256 int32, then a payload of uint16, both little-endian (data.md 2.1).

The header holds the magic number, the version, the number of entries, and zeros. Nothing follows the payload. Token
ids and byte sidecars share the format. Their names hold a trap: the pattern `*val_*.bin` also matches the sidecars
`fineweb_val_bytes_*.bin`. shard_paths is the one place where names with `_bytes_` are left out.

Source: the shard format of modded-nanogpt (KellerJordan), as published by the challenge.
"""

from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from fairway.runtime.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4

Split = Literal["train", "val"]


def write_shard(path: Path, values: np.ndarray) -> None:
    """Write values (n,) uint16 as one shard file. Raises ValueError if they are not one-dimensional uint16."""
    if values.dtype != np.uint16 or values.ndim != 1:
        raise ValueError(f"{path}: a shard holds one-dimensional uint16, not {values.dtype} of shape {values.shape}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(values)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(values, dtype="<u2").data)


def open_shard(path: Path, *, vocab_size: int | None) -> np.ndarray:
    """A shard's payload (n,) uint16, mapped read-only from the file, after its header and values were checked.

    With vocab_size None the values are not checked: those of a sidecar are byte counts. Raises UserError naming the
    file if it is missing, if its header or length is wrong, or if a value is no id of the vocabulary.
    """
    entries = _read_header(path)
    if not entries:
        return np.empty(0, dtype=np.uint16)
    values = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(entries,))
    if vocab_size is not None and (largest := int(values.max())) >= vocab_size:
        raise UserError(f"{path}: token {largest} lies outside the vocabulary of {vocab_size}")
    return values


def _read_header(path: Path) -> int:
    """The number of entries that the header states, after all checks that do not look at the payload."""
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m stages.tokenize` makes it") from None
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path}: {len(header)} bytes are no shard: the header alone has {HEADER_BYTES}")
    magic, version, entries = (int(value) for value in header.view("<i4")[:3])
    if magic != MAGIC:
        raise UserError(f"{path}: magic number {magic}, expected {MAGIC}: not a token shard")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, expected {VERSION}")
    expected, found = HEADER_BYTES + 2 * entries, path.stat().st_size
    if entries < 0 or found != expected:
        raise UserError(f"{path}: {found} bytes, expected {expected} for the {entries} entries of its header")
    return entries


def shard_paths(folder: Path, split: Split) -> list[Path]:
    """The paths of the token shards of one split, in their order. Raises UserError if there are none."""
    paths = sorted(path for path in folder.glob(f"*{split}_*.bin") if "_bytes_" not in path.name)
    if not paths:
        raise UserError(f"{folder}: no {split}_*.bin; `python -m stages.tokenize` makes them")
    return paths


def sidecar_paths(folder: Path) -> list[Path]:
    """The paths of the byte sidecars of the validation split, in their order; empty for tokenizers that need none."""
    return sorted(folder.glob("*val_bytes_*.bin"))


class ShardWriter:
    """Cuts a stream of uint16 into shards <name>_000000.bin, <name>_000001.bin, ... of `entries` values each.

    A context manager: leaving it writes the last shard, which may be short. A document may straddle two shards. A
    stream without any value leaves no file.
    """

    def __init__(self, folder: Path, name: str, entries: int) -> None:
        self.folder, self.name = folder, name
        self.written = 0
        self._shards = 0
        self._buffer = np.empty(entries, dtype=np.uint16)
        self._fill = 0

    def append(self, values: np.ndarray) -> None:
        """Add values (n,) uint16 to the end of the stream."""
        while len(values):
            room = values[: len(self._buffer) - self._fill]
            self._buffer[self._fill : self._fill + len(room)] = room
            self._fill += len(room)
            self.written += len(room)
            values = values[len(room) :]
            if self._fill == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        """Write the values in the buffer as the next shard."""
        write_shard(self.folder / f"{self.name}_{self._shards:06d}.bin", self._buffer[: self._fill])
        self._shards += 1
        self._fill = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._fill:
            self._flush()
