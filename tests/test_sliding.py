"""Sliding evaluation against the published programs (golden/sliding.npz) and the challenge's conditions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import golden, golden_network, golden_tokens, lively_network, random_stream, shallow_network, sliding
from test_model import RECORDS
from torch import Tensor

from fairway.evaluation.collect import bpb, collect, measure
from fairway.evaluation.registry import make_evaluator
from fairway.evaluation.scoring import WindowPass
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.evaluation.windows import Windows, overlapping_hidden, published, scored_once
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone
from fairway.runtime.errors import UserError

CPU = torch.device("cpu")
EVALUATOR = sliding(stride=4, batch_windows=3)


def _silent(_: int) -> None:
    pass


def test_nats_and_bpb_match_pr_1958() -> None:
    arrays, tokens = golden("sliding"), golden_tokens("sliding", "stream")
    nats = sliding(stride=16, batch_windows=4).score(golden_network("r1958", 64), tokens, _silent)
    np.testing.assert_allclose(nats, arrays["l2/nll"], rtol=0, atol=1e-3)
    expected = arrays["config"]["l2"]
    assert float(nats.mean()) == pytest.approx(expected["val_loss"], abs=1e-5)
    target_bytes = torch.from_numpy(arrays["sidecar"][1:])
    assert bpb(nats, target_bytes) == pytest.approx(expected["val_bpb"], abs=1e-5)


def test_nats_match_pr_1150_on_its_list() -> None:
    arrays, tokens = golden("sliding"), golden_tokens("sliding", "stream")
    windows = published(960, seq_len=64, stride=16)
    evaluation = WindowPass(golden_network("r1150", 64), tokens, [windows], alone(CPU), batch_windows=7)
    nats = torch.cat(
        [
            F.cross_entropy(logits, tokens[positions + 1], reduction="none")
            for positions, logits in evaluation.predict(0)
        ]
    )
    np.testing.assert_allclose(nats, arrays["l1/nll"], rtol=0, atol=1e-3)
    assert float(nats.double().mean()) == pytest.approx(arrays["config"]["l1"]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("record", RECORDS)
def test_the_last_places_alone_are_as_among_all(record: str) -> None:
    network, tokens = lively_network(record), random_stream(5, 31).view(2, 16)
    with torch.no_grad():
        expected = network.hidden(tokens)[:, -3:]
        found = torch.cat([overlapping_hidden(network, row, spacing=1, wanted=3) for row in tokens])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _literal_nats(network: GPT, tokens: Tensor, windows: Windows) -> Tensor:
    """Each window alone through the whole network, in order of scoring."""
    nats = []
    for begin, first, length in zip(windows.start, windows.first, windows.length, strict=True):
        with torch.no_grad():
            logits = network.logits(network.hidden(tokens[None, begin : begin + length]))[0, first:]
        nats.append(F.cross_entropy(logits, tokens[begin + first + 1 : begin + length + 1], reduction="none"))
    return torch.cat(nats).double()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(RECORDS)),
    st.integers(0, 99),
    st.integers(1, 90),
    st.sampled_from([1, 4, 5, 16]),
    st.sampled_from([scored_once, published]),
    st.booleans(),
    st.booleans(),
)
def test_batches_give_the_nats_of_windows_alone(
    record: str, seed: int, targets: int, stride: int, listed: Callable[..., Windows], scored_alone: bool, filled: bool
) -> None:
    """Total within 1e-4 and each within 1e-2, also where the stream cuts windows short, and filled up as on a GPU."""
    network, tokens = shallow_network(record), random_stream(seed, targets)
    windows = listed(targets, seq_len=16, stride=stride)
    width = stride if scored_alone else None
    evaluation = WindowPass(network, tokens, [windows], alone(CPU), batch_windows=3, width=width)
    evaluation.fills_up = filled
    found = torch.cat(
        [F.cross_entropy(logits, tokens[p + 1], reduction="none").double() for p, logits in evaluation.predict(0)]
    )
    expected = _literal_nats(network, tokens, windows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    assert abs(float((found - expected).sum())) <= 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.sampled_from([1, 4, 16]), st.integers(1, 9), st.booleans())
def test_only_the_windows_of_the_ends_share_no_batch_with_others(
    targets: int, stride: int, batch_windows: int, published_list: bool
) -> None:
    chosen = SlidingSettings(
        stride=stride, batch_windows=batch_windows, published_window_list=published_list, within_documents=False
    )
    evaluation = SlidingEvaluator(chosen).begin(shallow_network("r1150"), random_stream(3, targets), alone(CPU))
    assert isinstance(evaluation, WindowPass)
    usual = [(chunk.first == 16 - stride) & (chunk.length == 16) for chunk in evaluation.windows]
    assert all(bool(marks.all()) or not marks.any() for marks in usual)
    starts = torch.cat([chunk.start for chunk in evaluation.windows])
    assert torch.equal(starts, starts.sort().values)
    listed = published if published_list else scored_once
    assert torch.equal(starts, listed(targets, seq_len=16, stride=stride).start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("record", RECORDS)
def test_a_recorded_pass_on_a_gpu_scores_as_a_cpu_does(record: str) -> None:
    network, tokens = lively_network(record), random_stream(3, 200)
    expected = EVALUATOR.score(network, tokens, _silent)
    found = EVALUATOR.score(network.to_device(torch.device("cuda")), tokens.cuda(), _silent)
    assert float((found - expected).abs().mean()) < 0.05


def test_stride_of_a_whole_window_is_plain_evaluation() -> None:
    arrays, tokens = golden("sliding"), golden_tokens("sliding", "stream")
    nats = sliding(stride=64, batch_windows=4).score(golden_network("r1150", 64), tokens, _silent)
    batches = [float(part.mean()) for part in nats.split(4 * 64)]
    np.testing.assert_allclose(batches, arrays["plain/batch_losses"], rtol=0, atol=1e-4)
    assert float(nats.mean()) == pytest.approx(arrays["config"]["plain"]["val_loss"], abs=1e-5)


def test_with_the_published_list_figures_count_repeats_as_the_record_did() -> None:
    arrays, tokens = golden("sliding"), golden_tokens("sliding", "stream")
    settings = SlidingSettings(stride=16, batch_windows=4, published_window_list=True, within_documents=False)
    evaluation = SlidingEvaluator(settings).begin(golden_network("r1150", 64), tokens, alone(CPU))
    scores = collect(evaluation, tokens, alone(CPU), scored=lambda positions, nats: None)
    target_bytes = torch.zeros(960, dtype=torch.int64)
    target_bytes[torch.from_numpy(arrays["l1/position"]).long()] = torch.from_numpy(arrays["l1/bytes"]).long()
    found, expected = measure(scores, target_bytes), arrays["config"]["l1"]
    assert (found["targets"], found["scored"], found["bytes"]) == (960, expected["scored"], expected["bytes"])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    assert found["val_bpb"] == pytest.approx(expected["val_bpb"], abs=1e-5)


def test_bpb_is_nats_per_byte_in_bits() -> None:
    assert bpb(torch.tensor([math.log(2), math.log(8)]), torch.tensor([1, 3])) == pytest.approx(1.0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(2, 70), st.data())
def test_later_tokens_leave_earlier_nats_unchanged(seed: int, targets: int, data: st.DataObject) -> None:
    model, tokens = shallow_network(), random_stream(seed, targets)
    cut = data.draw(st.integers(1, targets), label="first changed token")
    changed = torch.cat([tokens[:cut], random_stream(seed + 1, targets)[cut:]])
    before, after = (EVALUATOR.score(model, stream, _silent) for stream in (tokens, changed))
    assert torch.equal(before[: cut - 1], after[: cut - 1])
    before, after = (EVALUATOR.log_probs(model, stream, [cut - 1]) for stream in (tokens, changed))
    assert torch.equal(before, after)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 16), st.integers(1, 5))
def test_batches_do_not_matter_and_distributions_are_what_was_scored(
    seed: int, targets: int, stride: int, batch_windows: int
) -> None:
    model, tokens = shallow_network(), random_stream(seed, targets)
    counted: list[int] = []
    evaluator = sliding(stride=stride, batch_windows=batch_windows)
    nats = evaluator.score(model, tokens, counted.append)
    assert (nats.shape, nats.dtype, sum(counted)) == ((targets,), torch.float64, targets)
    log_probs = evaluator.log_probs(model, tokens, range(targets))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(targets, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(-log_probs[range(targets), tokens[1:]], nats, rtol=0, atol=1e-5)
    one_by_one = sliding(stride=stride, batch_windows=1).score(model, tokens, _silent)
    torch.testing.assert_close(nats, one_by_one, rtol=0, atol=1e-4)


def test_enumerating_a_target_spends_exactly_one_unit_of_probability() -> None:
    """Σ over v of exp(-nats of v in that place) = 1: a test that only sees reported scores (evaluate.md 10.2)."""
    model, tokens, position = shallow_network(), random_stream(11, 40), 23
    total = 0.0
    for token in range(40):
        tokens[position + 1] = token
        total += math.exp(-float(EVALUATOR.score(model, tokens, _silent)[position]))
    assert total == pytest.approx(1, abs=1e-4)


def test_positions_come_back_in_the_order_asked() -> None:
    model, tokens = lively_network(), random_stream(2, 40)
    every = EVALUATOR.log_probs(model, tokens, range(40))
    assert torch.equal(EVALUATOR.log_probs(model, tokens, [31, 0, 31]), every[[31, 0, 31]])


def test_a_stride_beyond_the_models_rows_is_refused() -> None:
    settings, model = sliding(stride=17, batch_windows=1).settings, lively_network().config
    with pytest.raises(ValueError, match=r"^sliding_512.stride \(17\) exceeds model.seq_len \(16\)"):
        settings.check(section="sliding_512", model=model, processes=1)
    with pytest.raises(UserError, match=r"^params.yaml: sliding.stride \(17\) exceeds model.seq_len \(16\)"):
        make_evaluator("sliding", settings, model=model, processes=1)
