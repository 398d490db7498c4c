"""Trellis-coded quantization: codes and indices (codec/trellis.py), and the search (quantization/trellis_search.py)."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fairway.codec.entropy_coder import RowColumnAns
from fairway.codec.trellis import TrellisAns, codes_of, follow
from fairway.quantization.gptq import gptq
from fairway.quantization.trellis_search import trellis_codes

INDICES = arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(-64, 63))


@given(INDICES)
def test_indices_come_back_from_codes(indices: np.ndarray) -> None:
    codes = codes_of(indices)
    assert follow(codes)
    assert np.array_equal(codes >> 1, indices)


def test_of_two_neighbouring_codes_one_is_allowed() -> None:
    codes = codes_of(np.array([[0, 0], [3, 3], [-2, -1]], np.int8))
    assert not follow(codes ^ 1)


def test_an_index_whose_code_is_no_int8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beyond -64 \.\.\. 63"):
        codes_of(np.array([[64]], np.int8))


@settings(max_examples=20)
@given(st.lists(st.tuples(INDICES, st.booleans()), min_size=1, max_size=3))
def test_groups_come_back_with_some_matrices_on_the_trellis(matrices: list[tuple[np.ndarray, bool]]) -> None:
    group = [codes_of(matrix) if on_trellis else matrix for matrix, on_trellis in matrices]
    data = TrellisAns().encode(group)
    found = TrellisAns().decode(data, [(len(matrix), matrix.shape[1]) for matrix in group])
    assert all(map(np.array_equal, found, group))


@pytest.mark.parametrize("data", [b"", b"\2abc", b"\1", b"\0\0"])
def test_a_stream_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"trellis|ends early"):
        TrellisAns().decode(data, [(2, 2)])


def _cost(codes: np.ndarray, target: np.ndarray, step: np.ndarray) -> float:
    return float((step**2 * (target - codes) ** 2).sum())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_the_path_found_is_the_cheapest_of_all(seed: int, rows: int) -> None:
    """Against all indices near the target."""
    rng = np.random.default_rng(seed)
    target, step = rng.normal(0, 2, rows), rng.uniform(0.5, 2, rows)
    x, steps = (torch.tensor(part, dtype=torch.float64)[None] for part in (target * step, step))
    found = trellis_codes(x, steps, 62)[0].numpy()
    near = [range(int(t // 2) - 2, int(t // 2) + 3) for t in target]
    paths = (codes_of(np.array(path, np.int8)[:, None])[:, 0] for path in itertools.product(*near))
    assert follow(found.astype(np.int8)[:, None])
    assert _cost(found, target, step) == pytest.approx(min(_cost(path, target, step) for path in paths))


@given(st.integers(1, 70), st.integers(1, 3), st.sampled_from([2, 14, 126]))
@settings(max_examples=15, deadline=None)
def test_columns_of_any_length_follow_the_trellis_within_bounds(rows: int, columns: int, largest: int) -> None:
    x = 40 * torch.randn(columns, rows, generator=torch.Generator().manual_seed(rows))
    codes = trellis_codes(x, torch.ones_like(x), largest)
    assert float(codes.abs().max()) <= largest
    assert follow(codes.T.numpy().astype(np.int8))


def test_it_takes_an_eighth_of_a_bit_less_at_the_same_error() -> None:
    """Both by GPTQ, in what it lowers, tr(E H Eᵀ), and in bytes; steps of the trellis are widened by 1.13."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(320, 96, generator=generator)
    X = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    H, scales = X.T @ X, torch.full((1, 1, 320), 0.37)
    options: dict[str, Any] = {"bits": 6, "damping": 0.01, "block_size": 32}
    ((scalar, _),) = gptq(W[None], H[None], scales, grid="scalar", **options)
    ((trellis, _),) = gptq(W[None], H[None], 1.13 * scales, grid="trellis", **options)
    errors = [W - matrix.dequantize() for matrix in (scalar, trellis)]
    losses = [float((E @ H * E).sum()) for E in errors]
    assert losses[1] < 1.01 * losses[0]
    sizes = [len(RowColumnAns().encode([scalar.codes.numpy()])), len(TrellisAns().encode([trellis.codes.numpy()]))]
    assert 8 * (sizes[0] - sizes[1]) / W.numel() > 0.125
