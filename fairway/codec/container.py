"""model.bin: a network's configuration, codes and scales in one self-describing file.

    "FAIRWAY" | version u8 | bytes of the header, plain and packed, u32 each | header | streams | SHA-256 of all before

Numbers are little-endian. The header, a table of the tensors with the length of every stream, is JSON packed by Brotli.
The streams stand in the order of the header: for each class of tensors its codes (int8, packed by the codec), its
scales (float16) and the codes of its low-rank corrections, then all float16 tensors. Equal input gives equal bytes.

Reading trusts nothing. A checksum over everything finds damage. Lengths are checked before memory is taken, no stream
may grow beyond what the header says, and the header may not describe more than a laptop can hold. Nothing in the file
is executed. Every fault is a UserError.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from fairway.codec.byte_codecs import Brotli, Shuffled
from fairway.codec.codecs import CODECS, Serialized, in_parallel
from fairway.codec.codes import TENSOR_CLASSES, LowRank, Quantized, QuantizedState, TensorClass, tensor_class
from fairway.model.config import ModelConfig
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section

MAGIC = b"FAIRWAY"
VERSION = 1
PREFIX = struct.Struct(f"<{len(MAGIC)}sBII")
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_HEADER_BYTES = 2**22

PLAIN, FLOAT16 = Brotli(), Shuffled(Brotli())

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


def pack(config: ModelConfig, state: QuantizedState, *, codec: str) -> bytes:
    """The bytes of the file. `codec` is a key of CODECS."""
    in_order = sorted(state.items(), key=_place)
    floats = {name: value for name, value in in_order if isinstance(value, Tensor)}
    classes = []
    for kind in TENSOR_CLASSES:
        matrices = {name: v for name, v in in_order if isinstance(v, Quantized) and tensor_class(name) == kind}
        if matrices:
            classes.append((kind, matrices, codec))
    groups = in_parallel(_pack_group, classes)
    streams = [stream for _, group_streams in groups for stream in group_streams]
    streams.append(_pack_float16(floats.values()))
    header = Header(
        model=config,
        codec=codec,
        groups=[group for group, _ in groups],
        floats=[Entry(name=name, shape=list(value.shape), bits=16) for name, value in floats.items()],
        floats_bytes=len(streams[-1]),
    )
    plain = header.model_dump_json(exclude_defaults=True).encode()
    packed = PLAIN.encode(plain)
    body = b"".join([PREFIX.pack(MAGIC, VERSION, len(plain), len(packed)), packed, *streams])
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes) -> tuple[ModelConfig, QuantizedState]:
    """What pack was given, bit for bit. Raises UserError if the file is damaged, of another kind, or malicious."""
    header, position = _read_header(data)
    state: QuantizedState = {}

    def take(length: int) -> bytes:
        nonlocal position
        position += length
        return data[position - length : position]

    try:
        groups = [
            (group, (take(group.codes_bytes), take(group.scales_bytes), take(group.factors_bytes)), header.codec)
            for group in header.groups
        ]
        for matrices in in_parallel(_unpack_group, groups):
            state |= matrices
        values = _unpack_float16(take(header.floats_bytes), [entry.values for entry in header.floats])
        state |= {entry.name: value.reshape(entry.shape) for entry, value in zip(header.floats, values, strict=True)}
    except ValueError as error:
        raise UserError(f"damaged model file: {error}") from None
    return header.model, state


def check_round_trip(data: bytes, config: ModelConfig, state: QuantizedState) -> None:
    """Raise AssertionError unless unpacking `data` gives back exactly what was packed."""
    found_config, found = unpack(data)
    # Not by `assert`, which packing removes from the program that ships.
    if found_config != config or found.keys() != state.keys():
        raise AssertionError("the configuration or a tensor was lost on its way through the container")
    for name, value in state.items():
        if not _same(value, found[name]):
            raise AssertionError(f"{name} changed on its way through the container")


def read_header(data: bytes) -> Header:
    """The checked header of a file. Raises UserError as unpack does."""
    return _read_header(data)[0]


def _read_header(data: bytes) -> tuple[Header, int]:
    """The checked header, and the place where the streams begin."""
    if len(data) < PREFIX.size + DIGEST_BYTES or not data.startswith(MAGIC):
        raise UserError("not a Fairway model file")
    _, version, plain_bytes, packed_bytes = PREFIX.unpack_from(data)
    if version != VERSION:
        raise UserError(f"model file of version {version}, expected {VERSION}")
    if hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise UserError("damaged model file: the checksum does not match")
    start = PREFIX.size + packed_bytes
    if plain_bytes > MAX_HEADER_BYTES or start > len(data) - DIGEST_BYTES:
        raise UserError("damaged model file: impossible header length")
    try:
        header = Header.model_validate_json(PLAIN.decode(data[PREFIX.size : start], plain_bytes))
        check_table(header, len(data) - DIGEST_BYTES - start)
    except ValidationError as error:
        raise UserError(f"damaged model file: header: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise UserError(f"damaged model file: {error}") from None
    return header, start


def _pack_group(kind: TensorClass, matrices: dict[str, Quantized], codec: str) -> tuple[Group, list[bytes]]:
    """Pack the matrices of a class: their part of the header, and their three streams."""
    corrections = [matrix.correction for matrix in matrices.values() if matrix.correction]
    factors = [_array(factor) for correction in corrections for factor in (correction.a, correction.b)]
    scales = [part for matrix in matrices.values() for part in _scales(matrix)]
    streams = [
        CODECS[codec].encode([_array(matrix.codes) for matrix in matrices.values()]),
        _pack_float16(scales),
        Serialized(PLAIN).encode(factors),
    ]
    group = Group(
        kind=kind,
        matrices=[_entry(name, matrix) for name, matrix in matrices.items()],
        codes_bytes=len(streams[0]),
        scales_bytes=len(streams[1]),
        factors_bytes=len(streams[2]),
    )
    return group, streams


def _unpack_group(group: Group, streams: tuple[bytes, bytes, bytes], codec: str) -> QuantizedState:
    """The inverse of _pack_group. Raises ValueError if the streams do not hold exactly these matrices."""
    entries = group.matrices
    codes = CODECS[codec].decode(streams[0], [(entry.shape[0], entry.shape[1]) for entry in entries])
    scales = iter(_unpack_float16(streams[1], [count for entry in entries for count in entry.scale_counts]))
    factors = iter(Serialized(PLAIN).decode(streams[2], [shape for entry in entries for shape in entry.factor_shapes]))
    return {
        entry.name: Quantized(
            torch.from_numpy(matrix.copy()),
            next(scales),
            entry.bits,
            _correction(factors, scales) if entry.correction else None,
        )
        for entry, matrix in zip(entries, codes, strict=True)
    }


def _entry(name: str, matrix: Quantized) -> Entry:
    correction = None
    if matrix.correction:
        correction = Correction(rank=len(matrix.correction.b), scales=len(matrix.correction.b_scale))
    return Entry(name=name, shape=list(matrix.codes.shape), bits=matrix.bits, correction=correction)


def _scales(matrix: Quantized) -> list[Tensor]:
    """The float16 scales of a matrix, in the order of Entry.scale_counts."""
    correction = matrix.correction
    return [matrix.scale, *([correction.a_scale, correction.b_scale] if correction else [])]


def _correction(factors: Iterator[np.ndarray], scales: Iterator[Tensor]) -> LowRank:
    a, b = torch.from_numpy(next(factors).copy()), torch.from_numpy(next(factors).copy())
    return LowRank(a, b, next(scales), next(scales))


def _same(a: Quantized | Tensor, b: Quantized | Tensor) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b)
    parts = zip(_tensors(a), _tensors(b), strict=True)
    return a.bits == b.bits and all(torch.equal(mine.cpu(), other) for mine, other in parts)


def _tensors(matrix: Quantized) -> list[Tensor]:
    correction = matrix.correction
    return [matrix.codes, *_scales(matrix), *([correction.a, correction.b] if correction else [])]


def _place(item: tuple[str, object]) -> tuple[str, int]:
    """A key for sorting that puts the same matrix of all layers together: compressors like similar neighbours."""
    match = re.fullmatch(r"layer(\d+)\.(.*)", item[0])
    return (match[2], int(match[1])) if match else (item[0], -1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _pack_float16(tensors: Iterable[Tensor]) -> bytes:
    return FLOAT16.encode(b"".join(_array(tensor).astype("<f2", copy=False).tobytes() for tensor in tensors))


def _unpack_float16(data: bytes, counts: list[int]) -> list[Tensor]:
    """Float16 tensors of these lengths. Raises ValueError if `data` has another length or holds a number not finite."""
    values = torch.from_numpy(np.frombuffer(FLOAT16.decode(data, 2 * sum(counts)), "<f2").astype(np.float16))
    if not bool(values.isfinite().all()):
        raise ValueError("a number is not finite")
    return list(values.split(counts))
