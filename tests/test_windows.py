"""Window lists against the published enumerations (evaluate.md 2.3, 3, 13) and as properties."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import golden

from fairway.evaluation.windows import Windows, by_chunk, in_groups, published, runs, scored_once

SP1024, CASEOPS = 62_021_632, 47_851_520


def _scored(windows: Windows) -> int:
    return int((windows.length - windows.first).sum())


@pytest.mark.parametrize(("stride", "windows", "scored"), [(64, 969_088, 62_023_616), (96, 646_059, 62_023_584)])
def test_the_published_list_has_the_published_size(stride: int, windows: int, scored: int) -> None:
    made = published(SP1024, seq_len=2048, stride=stride)
    assert (len(made), _scored(made)) == (windows, scored)


def test_the_list_of_pr_1958_has_the_published_size() -> None:
    made = scored_once(CASEOPS, seq_len=2048, stride=64)
    assert (len(made), _scored(made), int(made.start[-1])) == (747_649, CASEOPS, 47_849_472)


def test_chunks_have_the_published_sizes() -> None:
    windows = published(SP1024, seq_len=2048, stride=64)
    sizes = [len(chunk) for chunk in by_chunk(windows, targets=SP1024, chunk_tokens=32_768)]
    assert (len(sizes), sizes[0], set(sizes[1:-1]), sizes[-1]) == (1893, 481, {512}, 415)


@pytest.mark.parametrize(("name", "make"), [("l1", published), ("l2", scored_once)])
def test_lists_equal_the_programs(name: str, make: object) -> None:
    arrays = golden("sliding")
    made = make(960, seq_len=64, stride=16)  # type: ignore[operator]
    columns = {"window_start": made.start, "first_scored_offset": made.first, "window_len": made.length}
    for column, found in columns.items():
        np.testing.assert_array_equal(found, arrays[f"{name}/{column}"])
    np.testing.assert_array_equal(made.positions(), arrays[f"{name}/position"])


sizes = st.tuples(st.integers(1, 400), st.integers(1, 40), st.integers(1, 40)).filter(lambda s: s[2] <= s[1])


@given(sizes)
def test_every_target_is_scored_exactly_once(size: tuple[int, int, int]) -> None:
    targets, seq_len, stride = size
    positions = scored_once(targets, seq_len=seq_len, stride=stride).positions()
    assert positions.tolist() == list(range(targets))


@given(sizes)
def test_the_published_list_misses_no_target(size: tuple[int, int, int]) -> None:
    targets, seq_len, stride = size
    positions = published(targets, seq_len=seq_len, stride=stride).positions()
    assert set(positions.tolist()) == set(range(targets))


@given(sizes)
def test_a_target_sees_all_but_a_stride_of_the_window(size: tuple[int, int, int]) -> None:
    targets, seq_len, stride = size
    windows = scored_once(targets, seq_len=seq_len, stride=stride)
    later = windows[windows.start > 0]
    assert bool((later.first + 1 >= seq_len - stride + 1).all())
    assert bool(((windows.length > windows.first) & (windows.length <= seq_len)).all())


@given(sizes, st.integers(1, 5))
def test_chunks_hold_every_window_in_order_where_its_first_target_lies(size: tuple[int, int, int], rows: int) -> None:
    targets, seq_len, stride = size
    windows, chunk_tokens = scored_once(targets, seq_len=seq_len, stride=stride), rows * seq_len
    chunks = by_chunk(windows, targets=targets, chunk_tokens=chunk_tokens)
    assert torch.equal(torch.cat([chunk.start for chunk in chunks]), windows.start)
    for index, chunk in enumerate(chunks):
        assert set(((chunk.start + chunk.first) // chunk_tokens).tolist()) <= {index}


@given(sizes, st.integers(1, 7))
def test_groups_hold_every_window_in_order(size: tuple[int, int, int], group: int) -> None:
    targets, seq_len, stride = size
    windows = scored_once(targets, seq_len=seq_len, stride=stride)
    groups = in_groups(windows, group)
    assert torch.equal(torch.cat([part.start for part in groups]), windows.start)
    assert {len(part) for part in groups[:-1]} <= {group}
    assert len(groups[-1]) <= group


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_runs_keep_the_order_and_are_of_one_kind(marks: list[bool]) -> None:
    marked, column = torch.tensor(marks), torch.arange(len(marks))
    found = runs(Windows(column, column, column), marked)
    assert torch.equal(torch.cat([run.start for run in found]), column)
    kinds = [marked[run.start].unique().tolist() for run in found]
    assert all(len(kind) == 1 for kind in kinds)
    assert all(before != after for before, after in pairwise(kinds))
