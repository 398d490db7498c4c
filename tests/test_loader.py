"""Orders of the training data against the published loaders (golden/loaders.json; training.md 2.3)."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.runtime.errors import UserError
from fairway.tokens.data_orders import (
    CoprimeWindows,
    PackedRows,
    Sequential,
    ShuffledWindows,
    document_bounds,
    name_seed,
    segment_bounds,
)
from fairway.tokens.loader import Batch, Prefetcher, Stream, Tokens
from fairway.tokens.shards import write_shard

GOLDEN = json.loads((Path(__file__).parent / "golden" / "loaders.json").read_text())
CPU = torch.device("cpu")


def write_shards(folder: Path, lengths: list[int], bos: list[list[int]] | None = None) -> Tokens:
    """Shards whose tokens are their own positions in the concatenation, or ones (BOS) at `bos` and zeros elsewhere."""
    starts = [0, *accumulate(lengths)]
    paths = []
    for i, length in enumerate(lengths):
        values = np.arange(starts[i], starts[i] + length).astype(np.uint16)
        if bos is not None:
            values = np.isin(np.arange(length), bos[i]).astype(np.uint16)
        paths.append(folder / f"train_{i:06d}.bin")
        write_shard(paths[-1], values)
    return Tokens(paths, vocab_size=65536)


def spans(batch: Batch) -> list[list[int]]:
    """[first input, inputs] of each row; checks that rows are runs of consecutive tokens, one ahead in the targets."""
    assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])
    return [[int(row[0]), len(row)] for row in batch.inputs]


def equal(one: Batch, other: Batch) -> bool:
    parts = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in parts)


def sequential(tokens: Tokens, *, rank: int = 0, size: int = 1, micro_batches: int = 8) -> Stream:
    order = Sequential(micro_batches=micro_batches, micro_batch_tokens=32)
    return Stream(tokens, order, row=16, rank=rank, size=size)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_sequential_reads_what_the_record_read(tmp_path: Path, size: int) -> None:
    case = GOLDEN["A"]
    tokens = write_shards(tmp_path, case["shard_lengths"])
    for rank in range(size):
        stream = sequential(tokens, rank=rank, size=size)
        for micro_step in case["runs"][f"R{size}"]:
            batch = stream.next_batch()
            expected = np.concatenate([np.arange(first, first + count) for first, count in micro_step[rank]])
            assert batch.inputs.flatten().tolist() == expected[:-1].tolist()
            assert batch.targets.flatten().tolist() == expected[1:].tolist()


def global_batches(tokens: Tokens, size: int, steps: int, micro_batches: int) -> list[Batch]:
    """The micro-batches of `steps` steps of `size` processes, in the order in which one process would take them."""
    streams = [sequential(tokens, rank=rank, size=size, micro_batches=micro_batches) for rank in range(size)]
    return [stream.next_batch() for _ in range(steps * micro_batches // size) for stream in streams]


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([1, 2, 3, 6]), steps=st.integers(1, 3))
def test_the_global_batch_does_not_depend_on_the_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory, size: int, steps: int
) -> None:
    tokens = write_shards(tmp_path_factory.mktemp("shards"), [100, 57, 301])
    alone = global_batches(tokens, 1, steps, micro_batches=6)
    shared = global_batches(tokens, size, steps, micro_batches=6)
    assert all(equal(one, other) for one, other in zip(alone, shared, strict=True))


@settings(deadline=None, max_examples=20)
@given(taken=st.integers(0, 20))
def test_a_stream_goes_on_where_its_state_was_taken(tmp_path_factory: pytest.TempPathFactory, taken: int) -> None:
    tokens = write_shards(tmp_path_factory.mktemp("shards"), [100, 57, 301])
    one, other = (Prefetcher(sequential(tokens), CPU) for _ in range(2))
    with one, other:
        for _ in range(taken):
            one.next_batch()
        other.next_batch()
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for _ in range(10):
            assert equal(one.next_batch(), other.next_batch())


def test_a_token_outside_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", np.arange(200, dtype=np.uint16))
    tokens = Tokens([tmp_path / "train_000000.bin"], vocab_size=100)
    with Prefetcher(sequential(tokens), CPU) as loader:
        for _ in range(3):
            loader.next_batch()
        with pytest.raises(UserError, match="token 131 lies outside the vocabulary of 100"):
            loader.next_batch()


def test_empty_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold no tokens"):
        write_shards(tmp_path, [0])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_coprime_windows_are_those_of_the_record(tmp_path: Path, size: int) -> None:
    """In the published program the order is a function of the number of processes; here of micro_batches."""
    case = GOLDEN["B"]
    tokens = write_shards(tmp_path, case["shard_lengths"])
    windows = case["tokens_per_step"] // 8 // case["seq_len"]
    seed = name_seed(case["paths"])
    assert hex(seed) == case["path_hash"]
    order = CoprimeWindows(tokens, window=case["seq_len"], micro_batches=size, windows=windows, seed=seed)
    for expected in case["runs"][f"R{size}"]:
        positions = [tokens.start(shard) + first for shard, first in expected]
        assert order.draw() == [positions[rank::size] for rank in range(size)]


def test_coprime_windows_mix_more_shards_later(tmp_path: Path) -> None:
    case = GOLDEN["B"]
    tokens = write_shards(tmp_path, case["shard_lengths"])
    order = CoprimeWindows(tokens, window=32, micro_batches=8, windows=4, seed=name_seed(case["paths"]))
    order.drawn = case["late_start"]["counter_forced_to"]
    assert order.draw()[0] == case["late_start"]["first_tokens_values"]


def test_coprime_windows_begin_as_specified(tmp_path: Path) -> None:
    """training.md section 6, check 5."""
    tokens = write_shards(tmp_path, [50_000, 60_000, 70_000, 80_000])
    seed = name_seed([f"shards/fineweb_train_{i:06d}.bin" for i in range(4)])
    assert seed == 0xC3D7B158E0B04CB8
    order = CoprimeWindows(tokens, window=1024, micro_batches=8, windows=4, seed=seed)
    first = [windows[0] for windows in order.draw()]
    expected = [(1, 17247), (0, 41274), (2, 20979), (3, 56224), (1, 42847), (3, 27552), (0, 18746), (2, 49651)]
    assert first == [tokens.start(shard) + offset for shard, offset in expected]


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("bucket", [16, 64])
def test_packed_rows_are_those_of_the_record(tmp_path: Path, size: int, bucket: int) -> None:
    case = GOLDEN["C"]
    tokens = write_shards(tmp_path, case["shard_lengths"], case["bos_positions"])
    order = PackedRows(tokens, micro_batches=size, micro_batch_tokens=128)
    for expected in case["runs" if bucket == 16 else "runs_bucket64"][f"R{size}"]:
        rows = order.draw()
        assert rows == [[tokens.start(row["shard"]) + row["start"]] for row in expected]
        for (position,), row in zip(rows, expected, strict=True):
            bounds = document_bounds(tokens.read(position, 128), cut=case["seq_len"], bucket=bucket)
            assert bounds.tolist() == row["cu"]


@pytest.mark.parametrize("case", GOLDEN["segments"])
def test_segment_bounds_are_those_of_the_record(case: dict[str, Any]) -> None:
    cut = case["cut"] or case["total"]
    bounds = segment_bounds(np.array(case["bos"], dtype=int), case["total"], cut=cut, bucket=case["bucket"])
    assert bounds.tolist() == case["cu"]


@pytest.mark.parametrize("size", [1, 2])
def test_shuffled_windows_are_those_of_the_record(tmp_path: Path, size: int) -> None:
    case = GOLDEN["D"]
    tokens = write_shards(tmp_path, GOLDEN["C"]["shard_lengths"])
    order = ShuffledWindows(tokens, window=case["seq_len"], micro_batches=size, windows=2)
    for expected in case["runs"][f"R{size}"]:
        assert order.draw() == [[tokens.start(shard) + first for shard, first in rows] for rows in expected]


@settings(deadline=None, max_examples=20)
@given(starts=st.sets(st.integers(0, 99)), total=st.integers(1, 100), cut=st.integers(1, 100))
def test_segments_tile_the_row_and_never_cross_a_document(starts: set[int], total: int, cut: int) -> None:
    inside = {start for start in starts if start < total}
    bounds = segment_bounds(np.array(sorted(inside), dtype=int), total, cut=cut, bucket=8)
    lengths = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert len(bounds) % 8 == 0
    assert inside <= set(bounds.tolist())
    assert 0 <= lengths.min() <= lengths.max() <= cut


ORDERS: dict[str, Callable[[Tokens], CoprimeWindows | ShuffledWindows | PackedRows]] = {
    "coprime": lambda tokens: CoprimeWindows(tokens, window=16, micro_batches=4, windows=2, seed=5),
    "shuffled": lambda tokens: ShuffledWindows(tokens, window=16, micro_batches=2, windows=2),
    "packed": lambda tokens: PackedRows(tokens, micro_batches=4, micro_batch_tokens=32),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_every_order_goes_on_from_its_state(tmp_path: Path, kind: str) -> None:
    """Also past the point where shards are exhausted."""
    tokens = write_shards(tmp_path, [150, 257, 301], [[3], [0, 9], []])
    one, other = ORDERS[kind](tokens), ORDERS[kind](tokens)
    for _ in range(7):
        one.draw()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.draw() for _ in range(9)] == [other.draw() for _ in range(9)]


@pytest.mark.parametrize("kind", ORDERS)
def test_shards_too_small_for_an_order_are_refused(tmp_path: Path, kind: str) -> None:
    tokens = write_shards(tmp_path, [10])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        ORDERS[kind](tokens).draw()


def test_packed_batches_are_single_rows_with_bounds(tmp_path: Path) -> None:
    tokens = write_shards(tmp_path, [500], [[0, 40, 70]])
    order = PackedRows(tokens, micro_batches=2, micro_batch_tokens=64)
    segment = partial(document_bounds, cut=32, bucket=4)
    batch = Stream(tokens, order, row=64, segment=segment).next_batch()
    assert batch.inputs.shape == batch.targets.shape == (1, 64)
    assert batch.segments is not None
    assert batch.segments.dtype == torch.int32
    assert batch.segments.tolist() == [0, 32, 40, 64]
