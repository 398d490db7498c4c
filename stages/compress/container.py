"""model.bin: a network's configuration, codes and scales in one self-describing file.

    "FAIRWAY" | version u8 | bytes of the header, plain and packed, u32 each | header | streams | SHA-256 of all before

Numbers are little-endian; the header is JSON packed by Brotli: the model section of params.yaml, the codec, and a table
of tensors with the length of every stream. Streams, in the header's order: for each class of tensor its codes (int8, by
the codec) and its row scales (float16), last the float16 tensors. Equal input gives equal bytes.

Reading trusts nothing. A checksum over everything finds damage; lengths are checked before anything is allocated; no
stream grows beyond what the table says, nor the table beyond MAX_VALUES; nothing in the file is executed. Every fault
is a UserError.
"""

import hashlib
import math
import re
import struct

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from model.config import ModelConfig, Section
from stages.compress.codecs import CODECS, Brotli, Shuffled
from stages.errors import UserError
from stages.quantize.classes import TENSOR_CLASSES, TensorClass, tensor_class
from stages.quantize.codes import Quantized, QuantizedState

MAGIC = b"FAIRWAY"
VERSION = 1
PREFIX = struct.Struct(f"<{len(MAGIC)}sBII")
DIGEST_BYTES = hashlib.sha256().digest_size
# Far above any network that fits 16 MB, far below what a laptop can hold.
MAX_VALUES = 2**28
MAX_HEADER_BYTES = 2**22

PLAIN, FLOAT16 = Brotli(), Shuffled(Brotli())


class Entry(Section):
    """A tensor of the table. `bits` of a matrix of codes, 16 of a float16 tensor."""

    name: str
    shape: list[int]
    bits: int = Field(ge=2, le=16)

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Group(Section):
    """The matrices of one class: their codes are one stream and their row scales another."""

    kind: TensorClass
    matrices: list[Entry] = Field(min_length=1)
    codes_bytes: int = Field(ge=0)
    scales_bytes: int = Field(ge=0)


class Header(Section):
    """What the file holds and where."""

    model: ModelConfig
    codec: str
    groups: list[Group]
    floats: list[Entry]
    floats_bytes: int = Field(ge=0)


def pack(config: ModelConfig, state: QuantizedState, *, codec: str) -> bytes:
    """The file's bytes. `codec` is a key of CODECS."""
    groups: list[Group] = []
    streams: list[bytes] = []
    for kind in TENSOR_CLASSES:
        group = {name: value for name, value in _in_order(state) if tensor_class(name) == kind}
        matrices = {name: value for name, value in group.items() if isinstance(value, Quantized)}
        if not matrices:
            continue
        codes = CODECS[codec].encode(b"".join(_raw(matrix.codes) for matrix in matrices.values()))
        scales = FLOAT16.encode(b"".join(_raw(matrix.scale) for matrix in matrices.values()))
        entries = [Entry(name=name, shape=list(m.codes.shape), bits=m.bits) for name, m in matrices.items()]
        groups.append(Group(kind=kind, matrices=entries, codes_bytes=len(codes), scales_bytes=len(scales)))
        streams += [codes, scales]
    floats = {name: value for name, value in _in_order(state) if isinstance(value, Tensor)}
    streams.append(FLOAT16.encode(b"".join(_raw(value) for value in floats.values())))
    header = Header(
        model=config,
        codec=codec,
        groups=groups,
        floats=[Entry(name=name, shape=list(value.shape), bits=16) for name, value in floats.items()],
        floats_bytes=len(streams[-1]),
    )
    plain = header.model_dump_json().encode()
    packed = PLAIN.encode(plain)
    body = b"".join([PREFIX.pack(MAGIC, VERSION, len(plain), len(packed)), packed, *streams])
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes) -> tuple[ModelConfig, QuantizedState]:
    """What pack was given, bit for bit. Raises UserError on a file that is damaged, of another kind, or malicious."""
    header, position = _read_header(data)
    state: QuantizedState = {}

    def take(length: int) -> bytes:
        nonlocal position
        position += length
        return data[position - length : position]

    try:
        for group in header.groups:
            state |= _read_group(header.codec, group, take(group.codes_bytes), take(group.scales_bytes))
        sizes = [2 * entry.values for entry in header.floats]
        raw = FLOAT16.decode(take(header.floats_bytes), sum(sizes))
        for entry, part in zip(header.floats, _split(raw, sizes), strict=True):
            values = _float16(part).reshape(entry.shape)
            if not bool(values.isfinite().all()):
                raise ValueError(f"{entry.name} is not finite")
            state[entry.name] = values
    except ValueError as error:
        raise UserError(f"damaged model file: {error}") from None
    return header.model, state


def check_round_trip(data: bytes, config: ModelConfig, state: QuantizedState) -> None:
    """Raises AssertionError unless unpacking `data` gives back exactly what was packed."""
    found_config, found = unpack(data)
    assert found_config == config, "the configuration changed on its way through the container"
    assert found.keys() == state.keys(), "the container lost a tensor"
    for name, value in state.items():
        assert _same(value, found[name]), f"{name} changed on its way through the container"


def _same(a: Quantized | Tensor, b: Quantized | Tensor) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b)
    return a.bits == b.bits and torch.equal(a.codes.cpu(), b.codes) and torch.equal(a.scale.cpu(), b.scale)


def read_header(data: bytes) -> Header:
    """The checked header of a file. Raises UserError as unpack does."""
    return _read_header(data)[0]


def _read_header(data: bytes) -> tuple[Header, int]:
    """The header and where the streams begin."""
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
        _check_table(header, len(data) - DIGEST_BYTES - start)
    except ValidationError as error:
        raise UserError(f"damaged model file: header: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise UserError(f"damaged model file: {error}") from None
    return header, start


def _check_table(header: Header, stream_bytes: int) -> None:
    """Raises ValueError unless names are unique, shapes plausible and stream lengths sum to the bytes there are."""
    matrices = [entry for group in header.groups for entry in group.matrices]
    entries = matrices + header.floats
    if header.codec not in CODECS:
        raise ValueError(f"unknown codec {header.codec[:40]!r}, expected one of {', '.join(CODECS)}")
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("a tensor occurs twice")
    if any(len(entry.shape) > 8 or min(entry.shape, default=1) < 1 for entry in entries):
        raise ValueError("impossible tensor shape")
    if any(len(entry.shape) != 2 or entry.bits > 8 for entry in matrices):
        raise ValueError("codes that are not a matrix of at most 8 bits")
    if sum(entry.values for entry in entries) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} weights")
    listed = sum(group.codes_bytes + group.scales_bytes for group in header.groups) + header.floats_bytes
    if listed != stream_bytes:
        raise ValueError(f"the streams should take {listed} bytes, {stream_bytes} are there")


def _read_group(codec: str, group: Group, codes: bytes, scales: bytes) -> QuantizedState:
    """The matrices of a group. Raises ValueError if the streams do not hold exactly these."""
    sizes = [entry.values for entry in group.matrices]
    rows = [2 * entry.shape[0] for entry in group.matrices]
    code_parts = _split(CODECS[codec].decode(codes, sum(sizes)), sizes)
    scale_parts = _split(FLOAT16.decode(scales, sum(rows)), rows)
    return {
        entry.name: Quantized(
            torch.from_numpy(np.frombuffer(code_part, np.int8).copy()).reshape(entry.shape),
            _float16(scale_part),
            entry.bits,
        )
        for entry, code_part, scale_part in zip(group.matrices, code_parts, scale_parts, strict=True)
    }


def _in_order(state: QuantizedState) -> list[tuple[str, Quantized | Tensor]]:
    """The same matrix of all layers side by side, layers ascending: a compressor likes its neighbours alike."""

    def place(item: tuple[str, object]) -> tuple[str, int]:
        match = re.fullmatch(r"layer(\d+)\.(.*)", item[0])
        return (match[2], int(match[1])) if match else (item[0], -1)

    return sorted(state.items(), key=place)


def _raw(tensor: Tensor) -> bytes:
    """Little-endian bytes, row-major."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _split(data: bytes, sizes: list[int]) -> list[bytes]:
    ends = np.cumsum(sizes, dtype=np.int64)
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _float16(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float16))
