"""The ways to run one network: whatever a context says, hidden states are those of whole rows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import drawn_adapters, lively_network, random_stream
from test_model import RECORDS
from torch import Tensor

from fairway.evaluation.kv_cache import Cache, cached_hidden
from fairway.evaluation.lora_adapters import LoraAdapters
from fairway.evaluation.windows import overlapping_hidden
from fairway.model.gpt import GPT

ROW = 16
records = st.sampled_from(sorted(RECORDS))


def _in_pieces(network: GPT, row: Tensor, cuts: list[int]) -> Tensor:
    """Hidden states of a row (1, T), piece by piece through the cache."""
    cache: Cache = ()
    pieces = []
    for begin, end in pairwise([0, *cuts, row.size(1)]):
        tokens = row[:, max(begin - 2, 0) : end]
        hidden, cache = cached_hidden(network, tokens, begin, cache)
        pieces.append(hidden)
    return torch.cat(pieces, 1)


@settings(max_examples=12, deadline=None)
@given(records, st.integers(0, 99), st.sets(st.integers(2, 15), max_size=4), st.integers(1, ROW), st.integers(1, ROW))
def test_rows_pieces_and_windows_agree(record: str, seed: int, cuts: set[int], spacing: int, wanted: int) -> None:
    """Three windows as whole rows, through the rolling cache in pieces of any size, and as overlapping windows."""
    network, stretch = lively_network(record), random_stream(seed, 2 * spacing + ROW - 1)
    rows = stretch.unfold(0, ROW, spacing)
    with torch.no_grad():
        expected = network.hidden(rows)
        in_pieces = torch.cat([_in_pieces(network, row[None], sorted(cuts)) for row in rows])
        few = network.hidden(rows, wanted=wanted)
        overlapping = overlapping_hidden(network, stretch, spacing=spacing, wanted=None)
        overlapping_few = overlapping_hidden(network, stretch, spacing=spacing, wanted=wanted)
    torch.testing.assert_close(in_pieces, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(few, expected[:, -wanted:], rtol=0, atol=1e-5)
    torch.testing.assert_close(overlapping, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(overlapping_few, expected[:, -wanted:], rtol=0, atol=1e-5)


def _random_adapters(network: GPT, rows: int) -> LoraAdapters:
    """Adapters that add something at every site."""
    generator = torch.Generator().manual_seed(1)
    adapters = drawn_adapters(network, rows)
    for B in adapters.second.values():
        B.data.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return adapters


@settings(max_examples=10, deadline=None)
@given(records, st.integers(0, 99), st.integers(1, ROW))
def test_adapters_work_alike_on_the_last_places_alone(record: str, seed: int, wanted: int) -> None:
    """Hidden states and the gradients of the adapters."""
    network, rows = lively_network(record), random_stream(seed, 2 * ROW - 1).view(2, ROW)
    adapters = _random_adapters(network, len(rows))
    whole = network.hidden(rows, adapters=adapters)[:, -wanted:]
    few = network.hidden(rows, adapters=adapters, wanted=wanted)
    torch.testing.assert_close(few, whole, rtol=0, atol=1e-5)
    for found, expected in zip(_gradients(few, adapters), _gradients(whole, adapters), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _gradients(hidden: Tensor, adapters: LoraAdapters) -> list[Tensor]:
    """Of a weighted sum of hidden states, by every factor but the head's."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.device)
    places = [*adapters.first.items(), *adapters.second.items()]
    factors = [factor for (site, _), factor in places if site != "head"]
    return list(torch.autograd.grad((hidden * weights).mean(), factors))


@pytest.mark.parametrize("record", RECORDS)
def test_no_way_of_running_it_leaves_anything_in_the_network(record: str) -> None:
    """Every module has the same attributes afterwards, and none of its own in the place of a method of its class."""
    network, rows = lively_network(record), random_stream(1, 2 * ROW - 1).view(2, ROW)
    before = {name: sorted(vars(module)) for name, module in network.named_modules()}
    cached_hidden(network, rows, 0, ())
    overlapping_hidden(network, rows.flatten(), spacing=4, wanted=4)
    network.hidden(rows, adapters=_random_adapters(network, 2))
    after = {name: sorted(vars(module)) for name, module in network.named_modules()}
    assert after == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("wanted", [None, 4])
def test_adapters_on_a_gpu_get_the_gradients_that_they_get_on_a_cpu(record: str, wanted: int | None) -> None:
    network, rows = lively_network(record), random_stream(3, 2 * ROW - 1).view(2, ROW)
    adapters = _random_adapters(network, 2)
    expected = _gradients(network.hidden(rows, adapters=adapters, wanted=wanted), adapters)
    network.to_device(torch.device("cuda"))
    adapters = LoraAdapters(network.config, adapters.numbers_BP.cuda().bfloat16(), adapters.rank, scale=adapters.scale)
    found = _gradients(network.hidden(rows.cuda(), adapters=adapters, wanted=wanted).float(), adapters)
    flat, expected_flat = (torch.cat([part.flatten().cpu() for part in parts]) for parts in (found, expected))
    assert torch.nn.functional.cosine_similarity(flat, expected_flat, dim=0) > 0.99
