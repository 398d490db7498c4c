"""Document-wise adapters against PR #1855 (golden/ttt_lora.npz; evaluate.md 5)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    checksums,
    drawn_adapters,
    golden,
    golden_network,
    golden_tokens,
    lively_network,
    random_stream,
    shallow_network,
)
from torch import Tensor

from fairway.evaluation.document_batches import Document, by_length, documents, lanes_of, phase_ends
from fairway.evaluation.lora_adapters import Factors, LoraAdapters, adapted_logits
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttPass, LoraTttSettings
from fairway.runtime.distributed import World, alone
from fairway.tokens.tokenizer import BOS

CPU = torch.device("cpu")
GOLDEN: dict[str, Any] = {"chunk_tokens": 8, "batch_documents": 2, "rank": 3, "alpha": 5.4, "lr": 0.01, "beta2": 0.99}
GOLDEN |= {"weight_decay": 0.5, "prefix_documents": 3, "phases": 2, "global_chunk_tokens": 48, "global_lr": 0.02}
GOLDEN |= {"global_momentum": 0.9, "grad_clip": 1.0, "carry_factors": True, "lanes": 1, "seed": 0}
SMALL = GOLDEN | {"chunk_tokens": 4, "global_chunk_tokens": 32, "prefix_documents": 4}


def _silent(_: int) -> None:
    pass


def test_losses_and_weights_match_pr_1855() -> None:
    """With its draws of first factors, in its order: the usual set, the odd one, and a new one behind each phase."""
    arrays, tokens = golden("ttt_lora"), golden_tokens("ttt_lora", "stream")
    draws = iter(range(4))

    def draw(rows: int) -> Factors:
        index = next(draws)
        return {site: torch.from_numpy(arrays[f"draw{index}/A_{site}"]) for site in ("q", "k", "v", "o", "mlp", "head")}

    model = golden_network("r1958", 24)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    evaluation = LoraTttPass(model, tokens, alone(CPU), LoraTttSettings(**GOLDEN), draw)
    event = 0
    for chunk in range(evaluation.chunks):
        for positions, logits in evaluation.predict(chunk):
            spans = enumerate(arrays[f"event{event:02d}/offset_len"])
            nll = arrays[f"event{event:02d}/nll"]
            expected = np.concatenate([nll[row, first : first + count] for row, (first, count) in spans])
            nats = F.cross_entropy(logits, tokens[positions + 1], reduction="none")
            np.testing.assert_allclose(nats, expected, rtol=0, atol=2e-3)
            event += 1
        if chunk + 1 < evaluation.chunks:
            np.testing.assert_array_equal(evaluation.phase_tokens(chunk), arrays[f"phase{chunk}/tokens"])
            evaluation.learn(chunk)
            moved = checksums(model, start, arrays["config"]["checksum_names"])
            np.testing.assert_allclose(moved, arrays["checksum_after_phase"][chunk], rtol=1e-2, atol=1e-5)
    assert event == arrays["config"]["events"]


def test_batches_and_phases_are_as_published() -> None:
    """50000 documents: 782 batches, 16 documents in the first; 1296, 2128 and 2960 documents done at the phases."""
    batches = by_length([Document(0, 1 + i % 977) for i in range(50_000)], 64)
    assert (len(batches), len(batches[0]), len(batches[-1])) == (782, 16, 64)
    ends = phase_ends(batches, 2500, 3, 8)
    assert [sum(len(batch) for batch in batches[:end]) for end in ends] == [1296, 2128, 2960]


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 5))
def test_documents_have_every_target_once(is_bos: list[bool], size: int) -> None:
    tokens = torch.tensor([BOS if bos else 7 for bos in is_bos] + [9])
    batches = by_length(documents(tokens), size)
    found = [document for batch in batches for document in batch]
    places = [place for document in found for place in range(document.begin, document.begin + document.targets)]
    assert sorted(places) == list(range(len(is_bos)))
    lengths = [document.targets for batch in reversed(batches) for document in batch]
    assert lengths == sorted(lengths)


def _adapters(model: Any, rows: int, *, seed: int = 1) -> LoraAdapters:
    return drawn_adapters(model, rows, seed=seed)


def test_adapters_that_add_nothing_change_nothing() -> None:
    model, tokens = lively_network("r1958"), random_stream(1, 31).view(2, 16)
    plain = model.hidden(tokens)
    adapters = _adapters(model, 2)
    torch.testing.assert_close(model.hidden(tokens, adapters=adapters), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapted_logits(model, plain, adapters), model.logits(plain), rtol=0, atol=1e-5)
    assert torch.equal(model.hidden(tokens), plain)


def test_every_site_and_application_learns() -> None:
    model, tokens = lively_network("r1958"), random_stream(1, 31).view(2, 16)
    adapters = _adapters(model, 2)
    adapted_logits(model, model.hidden(tokens, adapters=adapters), adapters).square().mean().backward()
    for B in adapters.second.values():
        assert B.grad is not None
        assert bool((B.grad.abs().amax((1, 2)) > 0).all())


def test_rows_have_adapters_of_their_own() -> None:
    model, tokens = lively_network("r1958"), random_stream(1, 31).view(2, 16)
    adapters = _adapters(model, 2)
    with torch.no_grad():
        before = model.hidden(tokens, adapters=adapters)
        for B in adapters.second.values():
            B[1] = 0.1
        after = model.hidden(tokens, adapters=adapters)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
    assert float((after[1] - before[1]).abs().max()) > 1e-3


def _stream() -> Tensor:
    """Documents of 30, 20, 10, ... targets, so that the order of visits is that of the stream."""
    tokens = random_stream(3, 76)
    tokens[[0, 30, 50, 60, 66, 70, 73]] = BOS
    return tokens


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    lanes=st.integers(1, 8),
    size=st.integers(1, 8),
)
def test_lanes_of_independent_documents_end_at_about_the_same_time(lengths: list[int], lanes: int, size: int) -> None:
    """Each batch goes to the lane that has least to do; the work is the tokens that are read, added up one by one."""
    batches = by_length([Document(0, length) for length in lengths], size)
    lane_of = lanes_of(batches, lanes, independent=True, seq_len=2048)
    tokens = [sum(min(i, 2048) - 0.5 for d in batch for i in range(1, d.targets + 1)) for batch in batches]
    work = [0.0] * lanes
    for count, lane in zip(tokens, lane_of, strict=True):
        assert work[lane] <= min(work) + 1e-3 * max(tokens)
        work[lane] += count


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_documents_alone_are_shared_by_all_processes(processes: int) -> None:
    """Whatever `lanes` says; every target is scored by one of them, with the same bits."""
    settings = LoraTttSettings(**(SMALL | {"batch_documents": 1, "phases": 0, "carry_factors": False, "lanes": 1}))
    evaluator, model, tokens = LoraTttEvaluator(settings), shallow_network("r1958"), _stream()
    expected, found = evaluator.score(model, tokens, _silent), torch.full((76,), torch.nan, dtype=torch.float64)
    for rank in range(processes):
        evaluation = evaluator.begin(model, tokens, World(rank=rank, size=processes, device=CPU))
        predictions = [prediction for chunk in range(evaluation.chunks) for prediction in evaluation.predict(chunk)]
        assert predictions
        for positions, logits in predictions:
            assert bool(found[positions].isnan().all())
            found[positions] = F.cross_entropy(logits, tokens[positions + 1], reduction="none").double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"carry_factors": True}, {"carry_factors": False}])
def test_a_stream_too_short_for_its_phases_is_worked_on_as_a_longer_one(changes: dict[str, Any]) -> None:
    """In as many lanes as the settings say, where documents that depend on no other have one a process."""
    phased = LoraTttEvaluator(LoraTttSettings(**(SMALL | changes | {"prefix_documents": 100, "lanes": 2})))
    evaluation = phased.begin(shallow_network("r1958"), _stream(), alone(CPU))
    assert isinstance(evaluation, LoraTttPass)
    assert (evaluation.phases, evaluation.chunks, evaluation.lanes) == (0, 1, 2)


def test_in_order_of_visits_nothing_is_seen_early() -> None:
    """One document a batch, longest first, is the order of this stream: then it is causal, phases and all."""
    evaluator = LoraTttEvaluator(LoraTttSettings(**(SMALL | {"batch_documents": 1})))
    model, tokens = shallow_network("r1958"), _stream()
    before = evaluator.score(model, tokens, _silent)
    assert bool(before.isfinite().all())
    for cut in (31, 45, 72):
        changed = tokens.clone()
        later = torch.arange(77) >= cut
        changed[later & (tokens != BOS)] = random_stream(4, 76)[later & (tokens != BOS)]
        after = evaluator.score(model, changed, _silent)
        assert torch.equal(before[: cut - 1], after[: cut - 1])


def test_distributions_are_normalised_and_are_what_was_scored() -> None:
    evaluator, model, tokens = LoraTttEvaluator(LoraTttSettings(**SMALL)), shallow_network("r1958"), _stream()
    nats, log_probs = evaluator.score(model, tokens, _silent), evaluator.log_probs(model, tokens, range(76))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(76, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(-log_probs[range(76), tokens[1:]], nats, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", [0, 40, 75])
def test_what_is_not_wanted_is_left_out_of_no_consequence(position: int) -> None:
    """Lanes without a wanted target predict nothing, others no batch behind it; the rest keeps its bits."""
    settings = LoraTttSettings(**(SMALL | {"batch_documents": 1, "lanes": 2, "phases": 1}))
    wanted = torch.arange(76) == position

    def predictions(wanted: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        evaluation = LoraTttEvaluator(settings).begin(shallow_network("r1958"), _stream(), alone(CPU))
        found = list(evaluation.predict(0, wanted))
        evaluation.learn(0)
        return found + list(evaluation.predict(1, wanted))

    whole, part = predictions(None), predictions(wanted)
    assert any(bool((positions == position).any()) for positions, _ in part)
    assert len(part) < len(whole)
    for positions, logits in part:
        assert any(torch.equal(positions, others) and torch.equal(logits, same) for others, same in whole)


def test_adapters_learn_a_document_that_repeats_itself() -> None:
    tokens = random_stream(3, 16)[:-1].repeat(10)
    tokens[0] = BOS
    settings = LoraTttSettings(**(SMALL | {"lr": 0.05, "phases": 0, "batch_documents": 1}))
    nats = LoraTttEvaluator(settings).score(shallow_network("r1958"), tokens, _silent)
    assert float(nats[-32:].mean()) < float(nats[:32].mean()) - 0.1 < math.inf


def test_the_model_is_left_as_it_was() -> None:
    model, tokens = shallow_network("r1958"), _stream()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hidden = model.hidden(tokens[None, :16]).detach()
    LoraTttEvaluator(LoraTttSettings(**SMALL)).score(model, tokens, _silent)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.hidden(tokens[None, :16]).detach(), hidden)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lanes": 3}, r"global_chunk_tokens \(32\) must be a multiple of lora_ttt.lanes \* model.seq_len \(48\)"),
        ({"chunk_tokens": 17}, r"lora_ttt.chunk_tokens \(17\) exceeds model.seq_len \(16\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], expected: str) -> None:
    settings = LoraTttSettings(**(SMALL | changes))
    with pytest.raises(ValueError, match=expected):
        settings.check(section="lora_ttt", model=lively_network("r1958").config, processes=1)


@pytest.mark.parametrize(("changes", "refused"), [({}, True), ({"lanes": 2}, False), ({"phases": 0}, True)])
def test_processes_without_a_lane_are_refused(changes: dict[str, Any], refused: bool) -> None:
    """Unless documents depend on no other."""
    model = lively_network("r1958").config
    alone = LoraTttSettings(**(SMALL | changes | {"phases": 0, "carry_factors": False}))
    alone.check(section="lora_ttt", model=model, processes=2)
    carried = LoraTttSettings(**(SMALL | changes))
    if refused:
        with pytest.raises(ValueError, match=r"^lora_ttt.lanes \(1\) is less than the 2 processes$"):
            carried.check(section="lora_ttt", model=model, processes=2)
    else:
        carried.check(section="lora_ttt", model=model, processes=2)


@settings(max_examples=10)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 6))
def test_documents_without_carried_factors_depend_on_no_other(
    lengths: list[int], batch_documents: int, which: int
) -> None:
    """A document alone in its stream is scored as among others, wherever it stands and whatever batch it is in."""
    alone = LoraTttSettings(
        **(SMALL | {"prefix_documents": 0, "phases": 0, "carry_factors": False, "batch_documents": batch_documents})
    )
    evaluator, model = LoraTttEvaluator(alone), lively_network("r1958")
    stream = torch.cat([_text(index, length) for index, length in enumerate(lengths)] + [torch.tensor([BOS])])
    which %= len(lengths)
    begin = sum(lengths[:which])
    alone_N1 = stream[begin : begin + lengths[which] + 1]
    among = evaluator.score(model, stream, _silent)[begin : begin + lengths[which]]
    np.testing.assert_allclose(among, evaluator.score(model, alone_N1, _silent), rtol=0, atol=1e-4)


def _text(index: int, length: int) -> torch.Tensor:
    tokens = torch.randint(2, 40, (length,), generator=torch.Generator().manual_seed(index))
    tokens[0] = BOS
    return tokens
