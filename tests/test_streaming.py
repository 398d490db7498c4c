"""Streaming evaluation against one long row with an explicit mask, and the challenge's conditions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import lively_network, random_stream, shallow_network, sliding
from test_model import RECORDS
from torch import Tensor

from fairway.evaluation.kv_cache import cached_hidden
from fairway.evaluation.streaming import StreamingEvaluator, StreamingSettings
from fairway.model.attention import rotary_table
from fairway.model.causal_attention import attend_recent
from fairway.model.context import Context
from fairway.runtime.distributed import World, alone
from fairway.runtime.errors import UserError

ROW = 16


def _evaluator(**changes: Any) -> StreamingEvaluator:
    return StreamingEvaluator(
        StreamingSettings(**({"block_tokens": 8, "lanes": 1, "within_documents": False} | changes))
    )


def _silent(_: int) -> None:
    pass


def _literal_nats(record: str, tokens: Tensor) -> Tensor:
    """All tokens as one row, in which each sees itself and the ROW - 1 tokens before it."""
    place = torch.arange(len(tokens) - 1)
    mask = (place <= place[:, None]) & (place > place[:, None] - ROW)

    def attend(q: Tensor, k: Tensor, v: Tensor, application: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    network, row = lively_network(record), tokens[None, :-1]
    with torch.no_grad():
        rope = rotary_table(network.config.rope, ROW, place.double(), torch.float32)
        context = Context(network.embed_tokens(row), rope, network.value_embeddings(row), attend)
        logits = network.logits(network.run_layers(context))[0]
    return F.cross_entropy(logits, tokens[1:], reduction="none").double()


@pytest.mark.parametrize("record", RECORDS)
def test_blocks_equal_one_long_row(record: str) -> None:
    tokens = random_stream(3, 85)
    found = _evaluator().score(lively_network(record), tokens, _silent)
    torch.testing.assert_close(found, _literal_nats(record, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("record", RECORDS)
def test_without_a_cache_the_network_is_itself(record: str) -> None:
    """Holds cached attention to the network's own."""
    network, tokens = lively_network(record), random_stream(5, 31).view(2, 16)
    with torch.no_grad():
        hidden, _ = cached_hidden(network, tokens, 0, ())
        torch.testing.assert_close(hidden, network.hidden(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_tokens", [2, 5, 12, 100])
def test_the_size_of_blocks_does_not_matter(block_tokens: int) -> None:
    network, tokens = shallow_network("r1958"), random_stream(6, 90)
    found = _evaluator(block_tokens=block_tokens).score(network, tokens, _silent)
    torch.testing.assert_close(found, _evaluator().score(network, tokens, _silent), rtol=0, atol=1e-4)


def test_lanes_are_streams_of_their_own() -> None:
    network, tokens = shallow_network(), random_stream(7, 96)
    found = _evaluator(lanes=2).score(network, tokens, _silent)
    halves = [_evaluator().score(network, part, _silent) for part in (tokens[:49], tokens[48:])]
    torch.testing.assert_close(found, torch.cat(halves), rtol=0, atol=1e-5)


def test_the_first_row_is_plain_evaluation() -> None:
    network, tokens = shallow_network(), random_stream(8, 64)
    plain = sliding(stride=ROW, batch_windows=1).score(network, tokens, _silent)
    found = _evaluator().score(network, tokens, _silent)
    torch.testing.assert_close(found[:ROW], plain[:ROW], rtol=0, atol=1e-5)
    assert float((found[ROW:] - plain[ROW:]).abs().max()) > 1e-3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(32, 90), st.integers(1, 2), st.data())
def test_later_tokens_leave_earlier_nats_unchanged(seed: int, targets: int, lanes: int, data: st.DataObject) -> None:
    network, tokens = shallow_network("r1958"), random_stream(seed, targets)
    cut = data.draw(st.integers(1, targets), label="first changed token")
    changed = torch.cat([tokens[:cut], random_stream(seed + 1, targets)[cut:]])
    before, after = (_evaluator(lanes=lanes).score(network, stream, _silent) for stream in (tokens, changed))
    assert torch.equal(before[: cut - 1], after[: cut - 1])
    before, after = (_evaluator(lanes=lanes).log_probs(network, stream, [cut - 1]) for stream in (tokens, changed))
    assert torch.equal(before, after)
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_every_target_is_scored_once() -> None:
    network, tokens = shallow_network(), random_stream(9, 101)
    evaluation = _evaluator(lanes=3, block_tokens=4).begin(network, tokens, alone(tokens.device))
    positions = []
    for chunk in range(evaluation.chunks):
        positions += [int(p) for found, _ in evaluation.predict(chunk) for p in found]
        evaluation.learn(chunk)
    assert sorted(positions) == list(range(101))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("queries", "keys", "window"), [(1024, 1024, 256), (1000, 1255, 256), (64, 2048, 2048)])
def test_the_window_on_a_gpu_is_the_plain_one(queries: int, keys: int, window: int) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = (2, queries, 8, 64), (2, keys, 4, 64), (2, keys, 4, 64)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    found, expected = (
        attend_recent(q, k, v, window=window),
        attend_recent(q.float(), k.float(), v.float(), window=window),
    )
    assert float((found.float() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("record", RECORDS)
def test_streaming_on_a_gpu_is_that_on_a_cpu(record: str) -> None:
    network, tokens = lively_network(record), random_stream(3, 200)
    expected = _evaluator(lanes=2).score(network, tokens, _silent)
    found = _evaluator(lanes=2).score(network.to_device(torch.device("cuda")), tokens.cuda(), _silent)
    assert float((found - expected).abs().mean()) < 0.05


def test_the_model_is_left_as_it_was() -> None:
    network, tokens = lively_network(), random_stream(7, 50)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = network.hidden(tokens[None, :16]).detach()
    _evaluator().score(network, tokens, _silent)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network.hidden(tokens[None, :16]).detach(), first)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lanes": 4}, r"streaming.lanes \(4\): too many for 50 targets in rows of 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        _evaluator(**changes).begin(lively_network(), random_stream(1, 50), alone(torch.device("cpu")))


def test_more_processes_than_lanes_are_refused() -> None:
    """As the program that ships may be started, whose settings were checked with another number."""
    network, tokens = lively_network("r1172"), random_stream(3, 85)
    world = World(rank=0, size=2, device=tokens.device)
    with pytest.raises(UserError, match=r"streaming\.lanes \(1\) is less than the 2 processes"):
        _evaluator(lanes=1).begin(network, tokens, world)
