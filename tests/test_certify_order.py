"""Certificates: where an evaluator is tried, in which order it is causal, and what a decoder must be told for it."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certify import ALONE, CLEAN, LEARNING, LEGAL, LORA, SLIDING, WITHIN, _certified, _failed, _network, _stream
from torch import Tensor

from fairway.certification.accounting import Evaluation, Text, accounting, order_bits, places_bits
from fairway.certification.black_box import BlackBox, baseline
from fairway.certification.decoder import choose_slices
from fairway.certification.excerpt import choose_excerpt, stream_order, visiting_order
from fairway.certification.experiments import Certified
from fairway.evaluation.document_batches import documents
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttPass, LoraTttSettings
from fairway.evaluation.passes import Pass
from fairway.evaluation.scoring import Batch, WindowPass, in_chunks, plain_head
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.evaluation.windows import scored_once
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.tokens.tokenizer import BOS


@pytest.mark.parametrize("name", LEGAL)
def test_the_first_two_updates_and_the_start_of_a_document_are_decoded(name: str) -> None:
    """With tokens on both sides of each."""
    stream = _stream(2000)
    box = BlackBox(LEGAL[name], _network())
    base = baseline(box, choose_excerpt(box, stream, tokens=60).tokens_N1)
    order = (visiting_order if name == "lora_ttt" else stream_order)(base)
    slices = choose_slices(base, order, 60)
    assert len(set(slices.indices.tolist())) == len(slices.indices) == 60
    assert len(order.edges(base)) == 2
    for edge in order.edges(base):
        assert {edge - 5, edge - 1, edge, edge + 5} <= set(slices.indices.tolist())
        before, behind = (int(base.chunk_N[order.positions[index]]) for index in (edge - 1, edge))
        assert before < behind or name == "streaming"
    starts = [position for position in slices.positions.tolist() if position and base.tokens_N1[position] == BOS]
    assert starts


def _documents_of(lengths: list[int]) -> Tensor:
    """A stream (N+1,) of documents with so many targets each, of tokens that differ from document to document."""
    texts = [[BOS, *(2 + (7 * index + place) % 38 for place in range(n - 1))] for index, n in enumerate(lengths)]
    return torch.tensor([*(token for text in texts for token in text), BOS])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(20, 60), min_size=6, max_size=12), st.integers(1, 30))
def test_an_excerpt_is_a_beginning_or_the_shortest_whole_documents(lengths: list[int], tokens: int) -> None:
    """A single long document in front makes a beginning with two phases longer than the short documents behind it."""
    stream = _documents_of([2000, *lengths])
    box = BlackBox(LEGAL["lora_ttt"], _network())
    found = choose_excerpt(box, stream, tokens=tokens)
    part = found.tokens_N1
    assert box.begin(part).chunks == 3
    whole = [stream[d.begin : d.begin + d.targets] for d in documents(stream)]
    chosen = [part[d.begin : d.begin + d.targets] for d in documents(part)]
    places = [next(i for i, text in enumerate(whole) if torch.equal(text, piece)) for piece in chosen]
    assert places == sorted(places)
    shortest = sorted(len(text) for text in whole)[: len(chosen)]
    assert sorted(map(len, chosen)) == shortest
    assert found.what.startswith(f"the {len(chosen)} shortest documents")
    # With one document fewer there is no second phase, or too few tokens.
    fewer = _documents_of(shortest[:-1])
    assert box.begin(fewer).chunks < 3 or len(fewer) - 1 < tokens


def test_a_beginning_is_preferred_where_it_is_not_much_longer() -> None:
    box = BlackBox(LEGAL["ttt"], _network())
    found = choose_excerpt(box, _stream(2000), tokens=60)
    assert found.what == "the first 336 targets of the stream"
    assert (box.begin(found.tokens_N1).chunks, found.learns) == (3, True)


def _lora(**changes: int) -> LoraTttEvaluator:
    return LoraTttEvaluator(LoraTttSettings(**(LORA | changes)))


def test_an_excerpt_has_documents_long_enough_for_a_phase_to_train_on() -> None:
    """Two long documents make a step of 320 tokens; the shortest ones alone would have to be nearly all of them."""
    stream = _documents_of([20] * 150 + [200] * 20)
    box = BlackBox(lambda: _lora(global_chunk_tokens=320), _network())
    found = choose_excerpt(box, stream, tokens=60)
    assert found.what == "the 14 shortest documents and 2 long ones, in the order of the stream, 680 targets"
    part = box.begin(found.tokens_N1)
    assert [part.learns(chunk) for chunk in range(part.chunks)] == [True, True, False]


def test_documents_visited_by_length_pass_in_that_order_for_who_is_told_where_they_start() -> None:
    found = _certified(_lora, _stream(1100), 60)
    assert (_failed(found.findings), found.starts_told) == (set(), True)
    assert found.findings["causality"].evidence["order"] == "visits"
    assert "is not causal for a decoder that does not know where they will start" in found.findings["causality"].why
    decoder = found.findings["decoder"]
    starts = decoder.evidence["given_starts"]
    assert starts > 3
    assert f"to a decoder that is told where the other {starts} documents tried start" in decoder.why
    assert decoder.evidence["given_others"] == 0


@cache
def _certified_of(name: str, tokens: int) -> Certified:
    """Of an evaluator that passes; made once, since several tests look at it."""
    return _certified(LEGAL[name], _stream(tokens + 1000), tokens)


def _assert_passes(name: str, tokens: int) -> None:
    findings = _certified_of(name, tokens).findings
    assert _failed(findings) == set(), {name: findings[name] for name in _failed(findings)}
    decoder = findings["decoder"].evidence
    assert decoder["decoded"] == decoder["tokens"] == tokens
    assert decoder["compressed_bytes"] == pytest.approx(decoder["claimed_bytes"], rel=1e-3, abs=8)
    assert decoder["chunk_ends"] >= 2
    assert decoder["updates"] == (2 if LEGAL[name] in LEARNING else 0)


@pytest.mark.parametrize("name", LEGAL)
def test_who_predicts_from_the_past_passes_and_decodes(name: str) -> None:
    _assert_passes(name, tokens=60)


@pytest.mark.long
@pytest.mark.parametrize("name", LEGAL)
def test_who_passes_decodes_two_thousand_tokens(name: str) -> None:
    _assert_passes(name, tokens=2000)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sliding", "ttt", "slot, carried"])
def test_who_passes_decodes_twenty_thousand_tokens(name: str) -> None:
    _assert_passes(name, tokens=20_000)


@pytest.mark.parametrize("name", sorted(set(LEGAL) - {"lora_ttt"}))
def test_who_goes_along_the_stream_is_told_nothing(name: str) -> None:
    found = _certified_of(name, 60)
    assert (_failed(found.findings), found.starts_told) == (set(), False)
    assert found.findings["decoder"].evidence["given_starts"] == 0


@pytest.mark.parametrize("name", WITHIN)
def test_who_keeps_documents_apart_need_not_be_told_where_they_start(name: str) -> None:
    """The layout may depend on later starts, but no prediction does: they become known in time."""
    found = _certified_of(name, 60)
    assert not found.starts_told
    assert found.findings["causality"].evidence["order"] == "stream"


def _documentwise(**changes: Any) -> Certified:
    """Of a stream with documents of very different lengths, which are visited in another order than the stream's."""
    stream = _documents_of([70, 21, 160, 33, 90, 24, 51, 40])
    return _certified(lambda: LoraTttEvaluator(LoraTttSettings(**(ALONE | changes))), stream, 120)


@pytest.mark.parametrize("chunk_batches", [32, 1])
def test_adapters_of_one_document_alone_are_decoded_in_the_order_of_the_stream(
    chunk_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches by length are for speed then: a decoder goes on document by document and is told nothing."""
    monkeypatch.setattr("fairway.evaluation.lora_ttt.CHUNK_BATCHES", chunk_batches)
    found = _documentwise()
    assert (_failed(found.findings), found.starts_told) == (set(), False)
    assert found.findings["causality"].evidence["order"] == "stream"
    assert found.findings["decoder"].evidence["decoded"] == 120


def test_documents_alone_are_decoded_though_later_ones_come_in_earlier_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder at the second document, the shortest, knows of two batches, and that document is in the sixth."""
    monkeypatch.setattr("fairway.evaluation.lora_ttt.CHUNK_BATCHES", 1)
    alone = LoraTttSettings(**(ALONE | {"batch_documents": 1}))
    found = _certified(lambda: LoraTttEvaluator(alone), _documents_of([60, 14, 18, 16, 15, 17]), 120)
    assert _failed(found.findings) == set()
    assert found.findings["decoder"].evidence["decoded"] == 120


@pytest.mark.parametrize("changes", [{"carry_factors": True}, {"prefix_documents": 2, "phases": 1}])
def test_adapters_that_know_other_documents_are_not(changes: dict[str, Any]) -> None:
    found = _documentwise(**changes)
    assert found.starts_told
    assert found.findings["causality"].evidence["order"] == "visits"


@dataclass(frozen=True)
class NearingTheEnd(SlidingEvaluator):
    """Expects a document to end where the next one starts, which it looks up."""

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        def head(model: GPT, batch: Batch, hid: Tensor) -> Tensor:
            logits_MV = plain_head(model, batch, hid)
            logits_MV[:, BOS] += 5.0 * (tokens_N1[batch.positions_M + 1] == BOS)
            return logits_MV

        windows = scored_once(len(tokens_N1) - 1, seq_len=model.config.seq_len, stride=self.settings.stride)
        return WindowPass(model, tokens_N1, in_chunks(windows, 6), world, batch_windows=6, head=head)


def test_who_looks_up_where_documents_start_must_be_told() -> None:
    found = _certified(lambda: NearingTheEnd(SlidingSettings(**SLIDING)), _stream(700), 40)
    assert found.starts_told
    assert found.findings["causality"].evidence["order"] == "visits"


class ByContent(LoraTttEvaluator):
    """Documents in an order that depends on what they say."""

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        evaluation = super().begin(model, tokens_N1, world)
        assert isinstance(evaluation, LoraTttPass)
        evaluation.batches.sort(key=lambda batch: -int(tokens_N1[batch[0].begin + 1 : batch[0].begin + 30].sum()))
        return evaluation


def test_an_order_that_nobody_can_compute_fails_and_its_bits_are_told() -> None:
    stream = _stream(2000)
    found = _certified(lambda: ByContent(_lora(batch_documents=1).settings), stream, 60).findings
    assert {"causality", "decoder"} <= _failed(found)
    count = int((stream == BOS).sum())
    told = f"to tell it an order of the {count} documents takes {order_bits(count):.0f} bits"
    assert told in found["causality"].why


def test_the_challenges_documents_take_so_many_bits() -> None:
    """50,000 in an arbitrary order, and where they start among the CaseOps tokens."""
    assert round(order_bits(50_000)) == 708_356
    assert round(places_bits(47_851_520, 49_999)) == 567_199


@given(st.integers(0, 40), st.integers(0, 40))
def test_bits_are_logarithms_of_counts(one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert places_bits(many, few) == pytest.approx(math.log2(math.comb(many, few)), abs=1e-9)
    assert order_bits(many) == pytest.approx(math.log2(math.factorial(many)), abs=1e-9)


@pytest.mark.parametrize(("start_nats", "verdict"), [(1.0, "fail"), (12.0, "pass")])
def test_a_score_that_leaves_out_what_must_be_told_is_no_code_length(start_nats: float, verdict: str) -> None:
    """Unless the code of the starts, which is then not needed, is at least as long as what is told instead."""
    told = torch.zeros(1000, dtype=torch.bool)
    told[99::100] = True
    nats = torch.where(told, start_nats, 2.0).double()
    target_bytes = torch.ones(1000, dtype=torch.int64)
    bpb = float(nats.sum()) / (1000 * math.log(2))
    metrics = {"val_bpb": bpb, "targets": 1000, "scored": 1000, "bytes": 1000, "eval_s": 1.0, "processes": 1}
    found = accounting(Evaluation(metrics, nats, 10, CLEAN, Text(0, 1000, None)), target_bytes, told, cap_bytes=10)
    bits = math.log2(math.comb(1000, 10))
    assert found.verdict == verdict
    assert found.evidence["told_bits"] == round(bits)
    assert found.evidence["told_bpb"] == pytest.approx((990 * 2.0 / math.log(2) + bits) / 1000)
    if verdict == "fail":
        assert f"must also be told where 10 documents start, which takes {bits:.0f} bits" in found.why
