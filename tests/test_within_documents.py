"""Documents kept apart in evaluation: nothing is predicted from another document, by any evaluator that can say so."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import PLAIN_TTT, lively_network, random_stream, shallow_network
from test_model import RECORDS
from torch import Tensor

from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.kv_cache import Documents, embed_documents, segment_bounds
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.evaluation.slot import SlotEvaluator
from fairway.evaluation.slot_offsets import SlotFitSettings, SlotSettings
from fairway.evaluation.streaming import StreamingEvaluator, StreamingSettings
from fairway.evaluation.ttt import TttEvaluator, TttPass, TttSettings, flat_gradients
from fairway.evaluation.windows import scored_once, within_documents
from fairway.model.embedding import BOS
from fairway.runtime.distributed import alone

CPU = torch.device("cpu")
WINDOWS: dict[str, Any] = {"stride": 4, "batch_windows": 3, "published_window_list": False, "within_documents": True}
TTT = WINDOWS | PLAIN_TTT | {"chunk_tokens": 32, "epochs": 2, "lr": 0.05, "momentum": 0.9, "grad_clip": 1.0}
TTT |= {"batch_rows": 2, "freeze_blocks": 0}
SLOT = WINDOWS | {"steps": 3, "lr": 0.05, "lr_end": None, "fitted_on": "context", "bias": True, "carried": False}
CARRIED = SLOT | {"fitted_on": "batch", "carried": True}
# Those of which nothing passes from one document to the next, and those that learn on the way.
APART: dict[str, Evaluator] = {
    "sliding": SlidingEvaluator(SlidingSettings(**WINDOWS)),
    "slot": SlotEvaluator(SlotSettings(**SLOT)),
    "streaming": StreamingEvaluator(StreamingSettings(block_tokens=7, lanes=1, within_documents=True)),
}
LEARNING: dict[str, Evaluator] = {
    "ttt": TttEvaluator(TttSettings(**TTT)),
    "carried": SlotEvaluator(SlotSettings(**CARRIED)),
}


def documents(seed: int, targets: int, starts: float = 0.08) -> Tensor:
    """A stream (N+1,) in which documents start by chance: most within a row of 16, some longer than two rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(targets + 1, generator=generator) < starts, BOS, random_stream(seed, targets))


def bounds(tokens: Tensor) -> list[tuple[int, int]]:
    """Where documents begin and end: the last target of one is the first token of the next."""
    begins = sorted({0, *(tokens[:-1] == BOS).nonzero()[:, 0].tolist()})
    return list(zip(begins, [*begins[1:], len(tokens) - 1], strict=True))


def _silent(_: int) -> None:
    pass


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 120), st.sampled_from([1, 4, 5, 16]), st.sampled_from([0.0, 0.03, 0.2, 0.9]))
def test_windows_are_those_of_each_document_by_itself(seed: int, targets: int, stride: int, starts: float) -> None:
    tokens = documents(seed, targets, starts)
    found = within_documents(tokens, seq_len=16, stride=stride)
    expected = [(begin, scored_once(end - begin, seq_len=16, stride=stride)) for begin, end in bounds(tokens)]
    assert torch.equal(found.start, torch.cat([begin + windows.start for begin, windows in expected]))
    assert torch.equal(found.length, torch.cat([windows.length for _, windows in expected]))
    assert torch.equal(found.first, torch.cat([windows.first for _, windows in expected]))
    assert found.positions().tolist() == list(range(targets))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", APART)
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 999), st.integers(16, 100))
def test_a_document_scores_as_if_it_were_the_whole_stream(name: str, record: str, seed: int, targets: int) -> None:
    network, tokens = shallow_network(record), documents(seed, targets)
    found = APART[name].score(network, tokens, _silent)
    for begin, end in bounds(tokens):
        # Streaming takes no stream shorter than a row, and in what follows a document all is predicted from that.
        alone_ = torch.cat([tokens[begin : end + 1], torch.full((16,), BOS)])
        expected = APART[name].score(network, alone_, _silent)[: end - begin]
        torch.testing.assert_close(found[begin:end], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", APART)
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 999), st.data())
def test_no_token_before_a_document_changes_its_scores(name: str, record: str, seed: int, data: st.DataObject) -> None:
    """Neither what the tokens are nor how many documents they make."""
    network, tokens = shallow_network(record), documents(seed, 80)
    begin = data.draw(st.sampled_from([begin for begin, _ in bounds(tokens)]), label="a document's start")
    changed = torch.cat([documents(seed + 1, 80, 0.3)[:begin], tokens[begin:]])
    before, after = (APART[name].score(network, stream, _silent) for stream in (tokens, changed))
    torch.testing.assert_close(before[begin:], after[begin:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", APART | LEARNING)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 999), st.integers(16, 120), st.data())
def test_no_later_token_changes_a_score(name: str, seed: int, targets: int, data: st.DataObject) -> None:
    """Nor where later documents start. Batches then have other windows in them, which rounds differently."""
    evaluator, network = (APART | LEARNING)[name], shallow_network()
    tokens, other = documents(seed, targets), documents(seed + 1, targets, 0.2)
    cut = data.draw(st.integers(1, targets), label="first changed token")
    changed = torch.cat([tokens[:cut], other[cut:]])
    before, after = (evaluator.score(network, stream, _silent) for stream in (tokens, changed))
    torch.testing.assert_close(before[: cut - 1], after[: cut - 1], rtol=0, atol=1e-4)
    before, after = (evaluator.log_probs(network, stream, [cut - 1]) for stream in (tokens, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", APART | LEARNING)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 999), st.integers(16, 120), st.sampled_from([0.0, 0.08, 0.5]))
def test_every_target_is_predicted_once_in_the_order_of_the_stream(
    name: str, seed: int, targets: int, starts: float
) -> None:
    tokens = documents(seed, targets, starts)
    evaluation = (APART | LEARNING)[name].begin(shallow_network(), tokens, alone(CPU))
    positions: list[int] = []
    for chunk in range(evaluation.chunks):
        positions += [int(p) for found, _ in evaluation.predict(chunk) for p in found]
        evaluation.learn(chunk)
    assert positions == list(range(targets))


def test_across_documents_scores_differ() -> None:
    """What the setting changes, on a stream of documents: every evaluator's first one stays as it is."""
    network, tokens = shallow_network("r1958"), documents(4, 90)
    first = bounds(tokens)[0][1]
    for evaluator in APART.values():
        across = type(evaluator)(evaluator.settings.model_copy(update={"within_documents": False}))
        difference = (evaluator.score(network, tokens, _silent) - across.score(network, tokens, _silent)).abs()
        assert float(difference[first:].max()) > 1e-2
        assert isinstance(evaluator, SlotEvaluator) or float(difference[:first].max()) < 1e-4


@pytest.mark.parametrize("changes", [{"batch_windows": 1}, {"batch_windows": 40}])
@pytest.mark.parametrize("name", ["sliding", "ttt"])
def test_the_size_of_batches_does_not_matter(name: str, changes: dict[str, Any]) -> None:
    network, tokens, evaluator = shallow_network(), documents(3, 120), (APART | LEARNING)[name]
    other = type(evaluator)(evaluator.settings.model_copy(update=changes))
    expected = evaluator.score(network, tokens, _silent)
    torch.testing.assert_close(other.score(network, tokens, _silent), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["slot", "carried"])
def test_without_steps_slot_is_sliding(name: str) -> None:
    network, tokens, evaluator = shallow_network(), documents(3, 120), (APART | LEARNING)[name]
    found = type(evaluator)(evaluator.settings.model_copy(update={"steps": 0})).score(network, tokens, _silent)
    torch.testing.assert_close(found, APART["sliding"].score(network, tokens, _silent), rtol=0, atol=1e-5)


def test_without_epochs_ttt_is_sliding() -> None:
    network, tokens = shallow_network(), documents(3, 120)
    found = TttEvaluator(TttSettings(**(TTT | {"epochs": 0}))).score(network, tokens, _silent)
    torch.testing.assert_close(found, APART["sliding"].score(network, tokens, _silent), rtol=0, atol=1e-5)


def test_ttt_trains_on_rows_in_which_documents_are_apart() -> None:
    """One step of a lane of two rows: its gradient is that of all pieces of documents in them, each as a row."""
    network, tokens = shallow_network("r1958"), random_stream(6, 96)
    tokens[[0, 5, 9, 20, 27]] = BOS
    evaluation = LEARNING["ttt"].begin(network, tokens, alone(CPU))
    assert isinstance(evaluation, TttPass)
    rows_2RT = torch.stack([tokens[k : 32 + k].view(2, 16) for k in (0, 1)])
    alone_ = flat_gradients(evaluation.model, list(evaluation.free.values()))
    expected = torch.zeros(())
    for begin, end in pairwise([0, 5, 9, 16, 20, 27, 32]):
        piece = torch.stack([tokens[None, begin + k : end + k] for k in (0, 1)])
        expected = expected + alone_(piece) * ((end - begin) / 32)
    found = evaluation._gradients(rows_2RT, *evaluation._bounds(rows_2RT[0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((evaluation._gradients(rows_2RT) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("record", RECORDS)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 8), st.data())
def test_no_later_token_changes_a_bit_of_an_embedding(record: str, seed: int, length: int, data: st.DataObject) -> None:
    """In rows as short as a decoder's steps, where the size of a matrix product most often decides how it rounds."""
    network, tokens, other = lively_network(record), documents(seed, length, 0.3), documents(seed + 1, length, 0.5)
    cut = data.draw(st.integers(1, length), label="first changed token")
    changed = torch.cat([tokens[:cut], other[cut:]])
    with torch.no_grad():
        before, after = (embed_documents(network, stream[None])[:, :cut] for stream in (tokens, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("record", RECORDS)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40))
def test_tokens_are_embedded_as_in_a_row_of_their_document(record: str, seed: int, length: int) -> None:
    network, tokens = lively_network(record), documents(seed, length, 0.4)
    with torch.no_grad():
        found = embed_documents(network, tokens[None, :-1])
        expected = torch.cat([network.embed_tokens(tokens[None, begin:end]) for begin, end in bounds(tokens)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(0, 5), st.integers(2, 7))
def test_segments_given_to_a_gpu_are_those_a_cpu_attends_within(seed: int, new: int, cached: int, window: int) -> None:
    """Segment by segment as FlashAttention does it: the last query of a segment stands at its last key."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.where(torch.rand(2, new, generator=generator) < 0.3, BOS, 5)
    reach = torch.randint(0, cached + 1, (2,), generator=generator)
    q, k, v = (torch.randn(2, length, 2, 4, generator=generator) for length in (new, cached + new, cached + new))
    kept_apart = Documents(tokens, cached, reach)
    queries, keys = (bound.tolist() for bound in segment_bounds(kept_apart.starts_BC, cached))
    pieces = []
    for i in range(len(queries) - 1):
        mine, theirs = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        some_q, some_k, some_v = (
            x.flatten(0, 1)[at].transpose(0, 1) for x, at in ((q, mine), (k, theirs), (v, theirs))
        )
        if some_q.size(1):
            back = torch.arange(some_k.size(1) - some_q.size(1), some_k.size(1))[:, None] - torch.arange(some_k.size(1))
            mask = (back >= 0) & (back < window)
            pieces.append(F.scaled_dot_product_attention(some_q, some_k, some_v, attn_mask=mask).transpose(0, 1))
    expected = torch.cat(pieces).view_as(q)
    torch.testing.assert_close(kept_apart.attend(q, k, v, window=window), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", APART | LEARNING)
@pytest.mark.parametrize("record", RECORDS)
def test_documents_are_apart_on_a_gpu_as_on_a_cpu(name: str, record: str) -> None:
    network, tokens, evaluator = shallow_network(record), documents(3, 200), (APART | LEARNING)[name]
    expected = evaluator.score(network, tokens, _silent)
    found = evaluator.score(network.to_device(torch.device("cuda")), tokens.cuda(), _silent)
    assert float((found - expected).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            SlidingSettings(**(WINDOWS | {"published_window_list": True})),
            "x.published_window_list: expected false with",
        ),
        (TttSettings(**(TTT | {"published_window_list": True})), "x.published_window_list: expected false with"),
        (SlotSettings(**(CARRIED | {"carried": False})), r"x.fitted_on \(batch\): expected context, or carried: true"),
        (SlotSettings(**(SLOT | {"fitted_on": "scored"})), r"x.fitted_on \(scored\): expected context, or carried"),
        (
            TttSettings(
                **(TTT | {"slot": SlotFitSettings(steps=1, lr=0.1, lr_end=None, fitted_on="batch", bias=True)})
            ),
            "x.slot: expected null with within_documents",
        ),
    ],
)
def test_what_makes_no_sense_within_documents_is_refused(chosen: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        chosen.check(section="x", model=shallow_network().config, processes=1)
    assert "\n" not in str(caught.value)
