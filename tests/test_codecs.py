"""Compressors: exact round trips, exact sizes, and decoders that survive whatever they are given."""

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_lrzip import install

from fairway.codec import byte_codecs, codecs
from fairway.codec.byte_codecs import Brotli, ByteCodec, Lrzip, Lzma, Shuffled, Zstd
from fairway.codec.codecs import CODECS, Codec, ColumnPieces, Serialized, is_tall, row_order
from fairway.codec.entropy_coder import MAX_BUCKETS, PREFIX, RowColumnAns, find_references, restore, subtract
from fairway.runtime.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
FAST = [Brotli(), Shuffled(Brotli()), Zstd(), Lzma()]
NAMES = [
    pytest.param(name, marks=pytest.mark.program("lrzip") if name == "lrzip" else ()) for name in [*CODECS, "columns"]
]
Shapes = list[tuple[int, int]]


def _codec(name: str) -> Codec:
    """By the name in params.yaml; "columns" is what lrzip is used through, with another compressor."""
    return ColumnPieces(Zstd()) if name == "columns" else CODECS[name]


def _gaussian(shapes: Shapes, *, seed: int, sigma: float = 3.0, spread: float = 0.0) -> Iterator[np.ndarray]:
    """Codes of which columns differ in scale, by `spread` on the logarithm."""
    rng = np.random.default_rng(seed)
    for rows, columns in shapes:
        scale = sigma * np.exp(spread * rng.standard_normal(columns))
        yield np.rint(scale * rng.standard_normal((rows, columns))).clip(-31, 31).astype(np.int8)


def _histogram_bits(matrix: np.ndarray) -> float:
    """What one static histogram needs for it, for nothing."""
    counts = np.unique(matrix, return_counts=True)[1]
    return float(-(counts * np.log2(counts / matrix.size)).sum())


@pytest.mark.parametrize("codec", FAST, ids=lambda codec: type(codec).__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.binary(min_size=1, max_size=3000))
def test_byte_codecs_round_trip_and_know_their_size(codec: ByteCodec, data: bytes) -> None:
    packed = codec.encode(data)
    assert codec.decode(packed, len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        with pytest.raises(ValueError, match="expected"):
            codec.decode(packed, wrong)
    with pytest.raises(ValueError, match=r".+"):
        codec.decode(packed[:-1], len(data))


@pytest.mark.parametrize("name", NAMES)
def test_codecs_bring_back_groups_of_matrices(name: str) -> None:
    shapes = [(1, 1), (7, 30), (64, 5), (1, 90)]
    matrices = list(_gaussian(shapes, seed=1))
    packed = _codec(name).encode(matrices)
    assert packed == _codec(name).encode(matrices)
    for matrix, found in zip(matrices, _codec(name).decode(packed, shapes), strict=True):
        np.testing.assert_array_equal(matrix, found)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_streams_raise_nothing_but_valueerror(name: str) -> None:
    shapes = [(12, 40), (9, 9), (30, 2)]
    packed = _codec(name).encode(list(_gaussian(shapes, seed=2)))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(packed), 4 if name == "lrzip" else 300):
        damaged = bytearray(packed)
        damaged[position] ^= int(rng.integers(1, 256))
        with suppress(ValueError):
            found = _codec(name).decode(bytes(damaged), shapes)
            assert [matrix.shape for matrix in found] == shapes
    for length in range(0, len(packed) - 1, 100 if name == "lrzip" else 7):
        with suppress(ValueError):
            _codec(name).decode(packed[:length], shapes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    sigma=st.sampled_from([0.0, 0.01, 0.3, 3.0, 40.0]),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_ans_brings_back_any_codes(seed: int, shapes: Shapes, sigma: float, spread: float) -> None:
    matrices = list(_gaussian(shapes, seed=seed, sigma=sigma, spread=spread))
    for matrix, found in zip(matrices, RowColumnAns().decode(RowColumnAns().encode(matrices), shapes), strict=True):
        np.testing.assert_array_equal(matrix, found)


@pytest.mark.parametrize("code", [-128, 0, 127])
def test_ans_brings_back_a_single_value(code: int) -> None:
    matrix = np.full((3, 5), code, np.int8)
    np.testing.assert_array_equal(RowColumnAns().decode(RowColumnAns().encode([matrix]), [(3, 5)])[0], matrix)


def test_ans_covers_the_whole_range_of_int8() -> None:
    matrix = np.arange(-128, 128).astype(np.int8).reshape(4, 64)
    np.testing.assert_array_equal(RowColumnAns().decode(RowColumnAns().encode([matrix]), [(4, 64)])[0], matrix)


def test_ans_is_within_a_percent_of_the_entropy_of_plain_gaussians() -> None:
    matrix = next(_gaussian([(512, 512)], seed=3))
    assert 8 * len(RowColumnAns().encode([matrix])) < 1.01 * _histogram_bits(matrix)


@pytest.mark.parametrize("transpose", [False, True])
def test_ans_makes_use_of_scales_that_differ(transpose: bool) -> None:
    """One histogram cannot see that columns, or rows, are of different size; Brotli only sees rows."""
    matrix = next(_gaussian([(512, 512)], seed=4, spread=0.5))
    matrix = np.ascontiguousarray(matrix.T) if transpose else matrix
    packed = RowColumnAns().encode([matrix])
    assert 8 * len(packed) < 0.97 * _histogram_bits(matrix)
    assert len(packed) < len(CODECS["brotli"].encode([matrix]))


def test_rows_that_are_alike_cost_what_they_differ() -> None:
    rng = np.random.default_rng(6)
    matrix = next(_gaussian([(200, 256)], seed=6, sigma=20.0)).clip(-60, 60)
    alone = len(RowColumnAns().encode([matrix]))
    matrix[100:] = matrix[0] + rng.integers(-1, 2, (100, 256))
    assert len(RowColumnAns().encode([matrix])) < 0.7 * alone


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 60), columns=st.integers(1, 8), noise=st.integers(0, 40))
def test_differences_of_rows_are_undone_exactly(seed: int, rows: int, columns: int, noise: int) -> None:
    rng = np.random.default_rng(seed)
    few = rng.integers(-100, 101, (3, columns))[rng.integers(0, 3, rows)]
    matrix = (few + rng.integers(-noise, noise + 1, (rows, columns))).clip(-127, 127).astype(np.int8)
    references = find_references(matrix)
    np.testing.assert_array_equal(restore(subtract(matrix, references), references), matrix)


def test_a_matrix_with_more_rows_than_references_can_name_is_not_compared_with_itself() -> None:
    """Its products would fill 134 MB at a time; what is left are the zeros that are returned."""
    matrix = np.ones((2**16, 2), np.int8)
    tracemalloc.start()
    references = find_references(matrix)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not references.any()
    assert peak_bytes < 2**20


def test_references_that_cannot_be_are_refused() -> None:
    ones = np.full((3, 4), 100, np.int8)
    for references, message in [([0, 3, 0], "later"), ([1, 0, 0], "later"), ([0, 1, 2], "beyond int8")]:
        with pytest.raises(ValueError, match=message):
            restore(ones, np.array(references, np.uint16))


def test_ans_models_that_cannot_be_are_refused() -> None:
    shapes = [(8, 8)]
    packed = RowColumnAns().encode(list(_gaussian(shapes, seed=5)))
    buckets, lowest, highest, length = PREFIX.unpack_from(packed)
    assert buckets <= MAX_BUCKETS
    rest = packed[PREFIX.size :]
    for prefix, message in [
        ((buckets, highest, lowest, length), "impossible model"),
        ((buckets, lowest, highest, 2**32 - 1), "impossible model"),
        ((buckets, lowest, highest, length - 4), r".+"),
        ((buckets + 1, lowest, highest, length), "expected"),
        ((0, lowest, highest, length), "expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            RowColumnAns().decode(PREFIX.pack(*prefix) + rest, shapes)
    with pytest.raises(ValueError, match=r".+"):
        RowColumnAns().decode(packed + bytes(4), shapes)
    with pytest.raises(ValueError, match="more codes than there are weights"):
        RowColumnAns().decode(packed + b"\1\0\0\0", shapes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=6),
    piece_codes=st.sampled_from([1, 50, 300, 2**22]),
)
def test_columns_in_pieces_bring_back_any_codes(seed: int, shapes: Shapes, piece_codes: int) -> None:
    matrices, codec = list(_gaussian(shapes, seed=seed, sigma=20.0)), ColumnPieces(Zstd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "PIECE_CODES", piece_codes)
        for matrix, found in zip(matrices, codec.decode(codec.encode(matrices), shapes), strict=True):
            np.testing.assert_array_equal(matrix, found)


def test_a_piece_ends_when_it_has_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "PIECE_CODES", 100)
    matrices = list(_gaussian([(5, 10), (5, 10), (30, 10), (1, 1)], seed=7))
    noted = _Noted()
    ColumnPieces(noted).encode(matrices)
    assert sorted(len(data) for data in noted.seen) == [1, 100, 300]


def test_columns_of_different_size_are_seen_by_those_who_read_columns() -> None:
    matrix = next(_gaussian([(512, 256)], seed=8, spread=0.7))
    by_rows, by_columns = (len(codec(Brotli()).encode([matrix])) for codec in (Serialized, ColumnPieces))
    assert by_columns < 0.95 * by_rows


def test_rows_that_are_alike_are_stored_side_by_side() -> None:
    """Four kinds of rows in disorder, first all of the kind of the first."""
    rng = np.random.default_rng(9)
    kinds = rng.integers(0, 4, 200)
    matrix = next(_gaussian([(4, 20)], seed=9, sigma=30.0))[kinds] + rng.integers(-1, 2, (200, 20)).astype(np.int8)
    order = row_order(matrix)
    assert sorted(order) == list(range(200))
    assert order[0] == 0
    assert np.count_nonzero(np.diff(kinds[order])) == 3


def test_each_row_is_followed_by_the_nearest_that_is_left() -> None:
    matrix = next(_gaussian([(40, 5)], seed=10)).astype(np.int64)
    order = row_order(matrix.astype(np.int8))
    for i, row in enumerate(order[:-1]):
        distances = np.square(matrix[order[i + 1 :]] - matrix[row]).sum(axis=1)
        assert distances[0] == distances.min()


def test_only_tall_matrices_are_reordered() -> None:
    assert is_tall((8192, 512))
    assert is_tall((5, 1))
    assert not any(map(is_tall, [(2048, 512), (512, 2048), (4, 1), (2**15, 512)]))
    np.testing.assert_array_equal(row_order(next(_gaussian([(40, 10)], seed=11))), np.arange(40))


def test_orders_and_lengths_that_cannot_be_are_refused() -> None:
    shapes, codec = [(12, 2), (3, 3)], ColumnPieces(Zstd())
    packed = codec.encode(list(_gaussian(shapes, seed=12)))
    orders, piece = (int(length) for length in np.frombuffer(packed[:8], "<u4"))
    twice = Brotli().encode(np.array([0, 0, *range(2, 12)], "<u2").tobytes())
    beyond = Brotli().encode(np.array([12, *range(1, 12)], "<u2").tobytes())
    for bad in (twice, beyond):
        with pytest.raises(ValueError, match="an order of rows that leaves one out"):
            codec.decode(np.array([len(bad), piece], "<u4").tobytes() + bad + packed[8 + orders :], shapes)
    for lengths in ([orders, piece + 1], [orders - 1, piece], [2**32 - 1, 2**32 - 1]):
        with pytest.raises(ValueError, match="the pieces are not as long as they should be"):
            codec.decode(np.array(lengths, "<u4").tobytes() + packed[8:], shapes)
    with pytest.raises(ValueError, match="the pieces are not as long as they should be"):
        codec.decode(packed[:4], shapes)


def test_pieces_are_packed_and_unpacked_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "PIECE_CODES", 1)
    matrices, codec = list(_gaussian([(3, 4)] * 3, seed=13)), ColumnPieces(_Meeting(3))
    for matrix, found in zip(matrices, codec.decode(codec.encode(matrices), [(3, 4)] * 3), strict=True):
        np.testing.assert_array_equal(matrix, found)


def test_lrzip_streams_of_the_first_layout_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    shapes = [(7, 30), (60, 5)]
    matrices = list(_gaussian(shapes, seed=14))
    old, new = Serialized(Lrzip()).encode(matrices), CODECS["lrzip"].encode(matrices)
    assert old.startswith(b"LRZI")
    assert old != new
    for stream in (old, new):
        for matrix, found in zip(matrices, CODECS["lrzip"].decode(stream, shapes), strict=True):
            np.testing.assert_array_equal(matrix, found)


@pytest.mark.program("lrzip")
def test_lrzip_itself_begins_its_files_so_and_compresses() -> None:
    data = bytes(5000)
    assert Lrzip().encode(data).startswith(Lrzip.MAGIC)
    assert len(Lrzip().encode(data)) < 500


def test_a_bomb_of_lrzip_is_stopped_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    packed = Lrzip().encode(bytes(100_000))
    assert Lrzip().decode(packed, 100_000) == bytes(100_000)
    with pytest.raises(ValueError, match="lrzip ended with status"):
        Lrzip().decode(packed, 50_000)
    with pytest.raises(ValueError, match="expected 99999 bytes, the stream holds more"):
        Lrzip().decode(packed, 99_999)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "lrzip ended with status 0 and wrote no file: no reason given"),
        ("echo 'No space left' >&2; echo 'on device'; exit 1", "status 1 and wrote no file: No space left on device"),
    ],
)
def test_lrzips_own_reason_is_told(script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    (tmp_path / "lrzip").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(UserError, match=message):
        Lrzip().encode(b"data")
    with pytest.raises(ValueError, match=message):
        Lrzip().decode(b"LRZI", 4)


def test_no_more_runs_of_lrzip_than_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run waits for a second one to start, which cannot be with one processor."""
    install(tmp_path, monkeypatch, together=2)
    program = (tmp_path / "lrzip").read_text().replace("-gt 400", "-gt 4")
    (tmp_path / "lrzip").write_text(program)
    monkeypatch.setattr(byte_codecs, "_FREE_PROCESSORS", threading.BoundedSemaphore(1))
    with pytest.raises(UserError, match="lrzip ended with status 3"):
        codecs.in_parallel(Lrzip().encode, [(b"first",), (b"second",)])
    monkeypatch.setattr(byte_codecs, "_FREE_PROCESSORS", threading.BoundedSemaphore(2))
    (tmp_path / "pack").unlink()
    assert codecs.in_parallel(Lrzip().encode, [(b"first",), (b"second",)]) == [b"LRZIfirst", b"LRZIsecond"]


class _Identity:
    def encode(self, data: bytes) -> bytes:
        return data

    def decode(self, data: bytes, size: int) -> bytes:
        assert len(data) == size
        return data


class _Noted(_Identity):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def encode(self, data: bytes) -> bytes:
        self.seen.append(data)
        return data


class _Meeting(_Identity):
    """Works once so many threads ask for it, and fails if they do not."""

    def __init__(self, threads: int) -> None:
        self.all_here = threading.Barrier(threads, timeout=20)

    def encode(self, data: bytes) -> bytes:
        self.all_here.wait()
        return data

    def decode(self, data: bytes, size: int) -> bytes:
        self.all_here.wait()
        return super().decode(data, size)


def test_the_shuffle_is_that_of_r1172() -> None:
    """golden/compress.npz; its six bytes of header are not ours."""
    codec = Shuffled(_Identity())
    checked = 0
    with np.load(GOLDEN / "compress.npz") as arrays:
        for j in range(6):
            if int(arrays[f"shuffle{j}/stride"][0]) == 2:
                plain, shuffled = arrays[f"shuffle{j}/in"].tobytes(), arrays[f"shuffle{j}/out"].tobytes()[6:]
                assert codec.encode(plain) == shuffled
                assert codec.decode(shuffled, len(plain)) == plain
                checked += 1
    assert checked


def test_a_missing_program_is_an_error_that_names_its_package() -> None:
    """Tests that are not marked as needing a program see none."""
    with pytest.raises(UserError, match="lrzip is not installed; expected the program of the package lrzip"):
        Lrzip().encode(b"data")
