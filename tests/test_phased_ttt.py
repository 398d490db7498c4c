"""The benchmark of phased LoRA TTT (benchmarks/phased_ttt.py): its documents, its count of work, its projection."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import shallow_network

from benchmarks.document_lengths import CHALLENGE_DOCUMENTS, document_stream, document_targets, documents_for
from benchmarks.phased_ttt import Rates, Work, fit_rates, global_steps, project, time_phased, work_of
from fairway.evaluation.lora_ttt import (
    Document,
    LoraTttEvaluator,
    LoraTttPass,
    LoraTttSettings,
    by_length,
    documents,
)
from fairway.runtime.distributed import alone

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"chunk_tokens": 4, "batch_documents": 2, "rank": 3, "alpha": 5.4, "lr": 0.01, "beta2": 0.99}
SETTINGS |= {"weight_decay": 0.5, "prefix_documents": 4, "phases": 2, "global_chunk_tokens": 32, "global_lr": 0.02}
SETTINGS |= {"global_momentum": 0.9, "grad_clip": 1.0, "carry_factors": True, "lanes": 2, "seed": 0}


def _batches(lengths: list[int], size: int) -> list[list[Document]]:
    return by_length([Document(0, targets) for targets in lengths], size)


def test_documents_are_as_long_as_the_challenges() -> None:
    """The stream's total, its longest documents, and the 131, 219 and 289 chunks of PR #1855's phases."""
    lengths = document_targets(CHALLENGE_DOCUMENTS)
    assert lengths == sorted(lengths)
    assert sum(lengths) == pytest.approx(47_851_520, rel=0.01)
    assert (lengths[-16], lengths[-1]) == (30_338, 97_113)
    batches = _batches(lengths, 64)
    steps = [global_steps(batches, end, count, 32_768) for end, count in ((21, 833), (34, 1666), (47, 2500))]
    assert [count + 1 for count in steps] == pytest.approx([131, 219, 289], abs=1)


@given(st.integers(2, 400))
def test_fewer_documents_are_taken_at_equal_distances(count: int) -> None:
    """Each stands for as many neighbours: its length is between those of the shortest and the longest of them."""
    every, few = document_targets(CHALLENGE_DOCUMENTS), document_targets(count)
    for index, targets in enumerate(few):
        first, last = (int(CHALLENGE_DOCUMENTS * place / count) for place in (index, index + 1))
        assert every[first] <= targets <= every[last - 1]


def test_a_stream_has_the_documents_asked_for() -> None:
    tokens = document_stream([5, 3, 9], vocab_size=40, seed=7)
    assert sorted(document.targets for document in documents(tokens)) == [3, 5, 9]
    assert len(tokens) == 18
    assert torch.equal(tokens, document_stream([5, 3, 9], vocab_size=40, seed=7))
    assert not torch.equal(tokens, document_stream([5, 3, 9], vocab_size=40, seed=8))


def test_the_count_of_documents_follows_the_targets() -> None:
    assert documents_for(47_851_520) == pytest.approx(CHALLENGE_DOCUMENTS, rel=0.01)
    assert documents_for(1) == 1


@given(st.lists(st.integers(1, 80), min_size=1, max_size=5), st.integers(1, 7), st.integers(7, 30))
def test_work_is_that_of_all_windows(lengths: list[int], chunk_tokens: int, seq_len: int) -> None:
    """Counted window by window: a document's chunk is predicted from as many tokens as end with it, or a row's."""
    windows = [
        [min(min(begin + chunk_tokens, targets), seq_len) for begin in range(0, targets, chunk_tokens)]
        for targets in lengths
    ]
    work = work_of([Document(0, targets) for targets in lengths], chunk_tokens=chunk_tokens, seq_len=seq_len)
    assert work == Work(max(map(len, windows)), sum(map(sum, windows)))


def test_rates_are_found_again() -> None:
    works = [Work(100, 5_000), Work(10, 4_000), Work(300, 100), Work(7, 90_000)]
    seconds = [Rates(0.2, 1e-4, 0.0).seconds(work) for work in works]
    assert fit_rates(works, seconds) == pytest.approx((0.2, 1e-4))


def test_no_rate_is_negative() -> None:
    """Seconds that grow with steps alone, and faster than they can: the tokens are given no negative time for it."""
    works = [Work(100, 1_000), Work(200, 4_000)]
    step_s, token_s = fit_rates(works, [1.0, 1.5])
    assert (step_s > 0, token_s) == (True, 0.0)


def test_the_slowest_lane_counts() -> None:
    """Three batches in two lanes, at a second a step: the first and the third are of one lane."""
    settings = LoraTttSettings(**(SETTINGS | {"phases": 0, "prefix_documents": 0}))
    assert project([4, 4, 8, 8, 12, 12], settings, Rates(1.0, 0.0, 0.0), seq_len=16) == [4.0]


def test_lanes_wait_at_a_phase_and_train() -> None:
    """Boundary 1 is reached by the first of four batches, and the other lane has one more in its hands."""
    settings = LoraTttSettings(**(SETTINGS | {"phases": 1, "prefix_documents": 2}))
    lengths = [4, 4, 8, 8, 60, 60, 80, 80]
    # Before the phase batches of 20 and 15 steps, and 4 · 32 tokens hold the 61 + 61; behind it 2 and 1.
    assert project(lengths, settings, Rates(1.0, 0.0, 100.0), seq_len=16) == [20.0 + 3 * 100.0, 2.0]


def test_global_steps_are_those_of_the_evaluator() -> None:
    settings = LoraTttSettings(**(SETTINGS | {"lanes": 1}))
    tokens = document_stream([5, 9, 17, 30, 41, 60, 62], vocab_size=40, seed=3)
    evaluation = LoraTttEvaluator(settings).begin(shallow_network("r1958"), tokens, alone(CPU))
    assert isinstance(evaluation, LoraTttPass)
    for chunk, end in enumerate(evaluation.bounds[1:-1]):
        chunks = -(-(len(evaluation.phase_tokens(chunk)) - 1) // 32)
        assert global_steps(evaluation.batches, end, 4 * (chunk + 1) // 2, 32) == chunks - 1


def test_an_evaluation_is_timed_and_projected() -> None:
    """The fewest targets there can be: one document of the middle length."""
    settings = LoraTttSettings(**(SETTINGS | {"chunk_tokens": 16}))
    times = time_phased(shallow_network("r1958"), settings, alone(CPU), targets=1)
    assert times.targets == document_targets(1)[0]
    assert times.rates.global_step_s > 0
    assert len(times.challenge_s) == 3
    assert sum(times.challenge_s) > times.warm_s == sum(times.chunk_s) + sum(times.global_s) > 0
    assert "longest documents" in times.summary()
