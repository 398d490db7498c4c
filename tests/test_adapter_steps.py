"""Phased LoRA TTT in groups of rows, filled-up windows and recorded graphs against the plain way of doing it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from streams import random_stream, shallow_network
from test_kernels import error
from test_lora_ttt import SMALL
from test_model import RECORDS
from torch import Tensor

from fairway.evaluation.adapter_steps import EPS, AdamW, AdapterSets
from fairway.evaluation.collect import collect
from fairway.evaluation.document_batches import GROUP_TOKENS, Cut, Document, row_groups, window_length, windows
from fairway.evaluation.lora_adapters import LoraAdapters, adapted_logits, adapted_products, numbers_of_a_set
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttPass, LoraTttSettings
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone, make_deterministic
from fairway.tokens.tokenizer import BOS

CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=70).map(sorted)


@given(lengths, st.integers(0, 5000), st.sampled_from([128, 1024, 2048]))
def test_groups_hold_every_row_that_goes_on(targets: list[int], begin: int, length: int) -> None:
    """Once, in ascending order, by powers of two; other rows only where the last rows do not fill their groups."""
    groups = row_groups([Document(0, count) for count in targets], begin, length)
    rows = [row for group in groups for row in range(group.start, group.stop)]
    assert rows == list(range(len(targets) - len(rows), len(targets)))
    assert {row for row, count in enumerate(targets) if count > begin} <= set(rows)
    sizes = [group.stop - group.start for group in groups]
    assert all(size & (size - 1) == 0 and size * length <= GROUP_TOKENS for size in sizes)
    going = sum(count > begin for count in targets)
    assert len(rows) < 2 * max(going, 1)


@given(lengths.map(lambda counts: counts[:4]), st.integers(0, 100), st.integers(1, 48))
def test_windows_are_those_of_each_document(targets: list[int], index: int, size: int) -> None:
    """Written out by hand, document by document: what is read, what is scored and who goes on."""
    seq_len, begin, tokens = 500, index * size, torch.arange(1, sum(targets) + 2)
    starts = [sum(targets[:row]) for row in range(len(targets))]
    docs = [Document(start, count) for start, count in zip(starts, targets, strict=True)]
    cut = Cut(docs, begin, size, seq_len)
    w = windows(tokens, cut.table_R4, cut.length, size)
    assert cut.length == window_length(docs, begin + size, seq_len)
    assert cut.length % 256 == 0 or cut.length == seq_len
    found = iter(cut.positions_M.tolist())
    for row, document in enumerate(docs):
        end = min(begin + size, document.targets)
        first = document.begin + max(end - seq_len, 0)
        read = tokens[first : document.begin + end]
        assert torch.equal(w.tokens_RT[row], F.pad(read, (0, cut.length - len(read))))
        for column in range(begin, end):
            position = next(found)
            assert position == document.begin + column
            assert w.tokens_RT[row, w.columns_RC[row, column - begin]] == tokens[position]
            assert w.targets_RC[row, column - begin] == tokens[position + 1]
        assert bool(w.goes_on_R[row]) == (document.targets > begin + size)
    assert next(found, None) is None


def _plain_pass(model: GPT, evaluation: LoraTttPass, factors: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """One lane without phases: all rows at every cut, windows as long as they are, and torch's own AdamW."""
    s, config, tokens = evaluation.settings, model.config, evaluation.tokens_N1
    numbers = torch.zeros(s.batch_documents, numbers_of_a_set(config, s.rank)[1])
    adapters = LoraAdapters(config, numbers, s.rank, scale=s.alpha / s.rank)
    adapters.set_first(factors)
    for batch in evaluation.batches:
        with torch.no_grad():
            for B in adapters.second.values():
                B.zero_()
        optimizer = torch.optim.AdamW(adapters.factors, s.lr, (0.0, s.beta2), EPS, s.weight_decay)
        for begin in range(0, batch[-1].targets, s.chunk_tokens):
            losses = []
            for row, document in enumerate(batch):
                end = min(begin + s.chunk_tokens, document.targets)
                first = max(end - config.seq_len, 0)
                places = torch.arange(document.begin + first, document.begin + end)
                # The other rows' adapters need a row of some tokens each.
                rows = tokens[places].expand(len(batch), -1)
                scored = adapted_logits(model, model.hidden(rows, adapters=adapters), adapters)[row, begin - first :]
                losses.append(F.cross_entropy(scored, tokens[places[begin - first :] + 1]) if len(scored) else None)
                if len(scored):
                    yield places[begin - first :], scored.detach()
                if document.targets <= begin + s.chunk_tokens:
                    losses.pop()
            if losses:
                optimizer.zero_grad()
                torch.stack([loss for loss in losses if loss is not None]).sum().backward()
                optimizer.step()


def _documents() -> Tensor:
    tokens = random_stream(5, 120)
    tokens[[0, 37, 61, 64, 80, 100, 111]] = BOS
    return tokens[:112]


def test_rows_that_have_ended_may_be_left_out() -> None:
    """Two batches of three documents each, the second with the adapters of the first, decayed as if all had gone on."""
    model, tokens = shallow_network("r1958"), _documents()
    settings = LoraTttSettings(**(SMALL | {"batch_documents": 3, "phases": 0, "lr": 0.02}))
    evaluation = LoraTttEvaluator(settings).begin(model, tokens, alone(CPU))
    assert isinstance(evaluation, LoraTttPass)
    found, expected = torch.zeros(111, 40), torch.zeros(111, 40)
    for positions, logits in evaluation.predict(0):
        found[positions] = logits
    factors = evaluation.draw(3)
    for positions, logits in _plain_pass(model, evaluation, factors):
        expected[positions] = logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("further", "channels"), [(0, 0), (2, 3)])
def test_joint_products_have_the_gradients_of_their_formula(further: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 5, 6), (7, 6), (2, (2 + further) * 3, 6), (2, 4, 3), (2, 3, 3)]
    x, weight, A, *Bs = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    free = [tensor.requires_grad_() for tensor in (x, A, *Bs)]

    def plain(x: Tensor, A: Tensor, *Bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reads = (x @ A.mT).split(3, 2)
        added = [0.7 * read @ B.mT for read, B in zip(reads, Bs, strict=False)]
        return F.linear(x, weight) + torch.cat(added, 2), torch.cat([*reads[2:], x[..., :0]], 2), x[..., :channels]

    def joint(x: Tensor, A: Tensor, *Bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return adapted_products(x, weight, A, Bs, scale=0.7, channels=channels)

    for found, expected in zip(joint(*free), plain(*free), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(joint, free)


def _sets(device: torch.device, rows: int = 4) -> tuple[AdapterSets, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    numbers, *gradients = torch.randn(4, rows, 3000, generator=generator)
    return AdapterSets(numbers.to(device), 1000, AdamW(1e-2, 0.9, 0.5)), [x.to(device) for x in gradients]


def test_steps_are_those_of_adamw() -> None:
    """Three steps; then what two more would do to first factors that get no gradient."""
    sets, gradients = _sets(CPU)
    parameter = torch.nn.Parameter(sets.numbers_BP.clone())
    optimizer = torch.optim.AdamW([parameter], 1e-2, (0.0, 0.9), EPS, 0.5)
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = gradient
        optimizer.step()
        for rows in (slice(0, 1), slice(1, 4)):
            sets.step(rows, gradient[rows], step)
    torch.testing.assert_close(sets.numbers_BP, parameter.detach())
    for _ in range(2):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    sets.decay(torch.tensor([2, 2, 0, 2]))
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(sets.numbers_BP[kept, :1000], parameter.detach()[kept, :1000])
    sets.forget()
    assert not sets.numbers_BP[:, 1000:].any()
    assert not sets.squares_BP.any()


def _network() -> GPT:
    """The mechanisms of r1958 at 128 channels, for rows of 512 tokens, every parameter moved off its initial value."""
    small = {"vocab_size": 256, "width": 128, "heads": 4, "kv_heads": 2, "mlp_hidden": 192, "seq_len": 512}
    model = GPT(ModelConfig.model_validate(RECORDS["r1958"] | small | {"table_dtype": "float32"}))
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


GPU: dict[str, Any] = SMALL | {"chunk_tokens": 64, "batch_documents": 3, "rank": 8, "alpha": 14.4, "lr": 1e-3}
GPU |= {"prefix_documents": 4, "phases": 2, "global_chunk_tokens": 1024}


def _nats(model: GPT, device: torch.device, *, recorded: bool) -> Tensor:
    """Of a stream with repetitive documents of 100 to 900 tokens, so that adapters learn something, and two phases."""
    generator = torch.Generator().manual_seed(3)
    counts = [100, 130, 300, 310, 520, 700, 760, 900]
    docs = [torch.randint(2, 256, (90,), generator=generator).repeat(20)[:count] for count in counts]
    for document in docs:
        document[0] = BOS
    tokens = torch.cat([*docs, torch.tensor([7])]).to(device)
    evaluation = LoraTttEvaluator(LoraTttSettings(**GPU)).begin(copy.deepcopy(model), tokens, alone(device))
    assert isinstance(evaluation, LoraTttPass)
    assert evaluation.chunks == 3
    if not recorded:
        evaluation.steps._memory = None
    return collect(evaluation, tokens, alone(device), scored=lambda positions, nats: None).nats_N


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_graphs_score_as_launched_kernels_do() -> None:
    """And both as float32 on a CPU does, as far as bfloat16 goes."""
    make_deterministic()
    model = _network()
    expected = _nats(model, CPU, recorded=False)
    model.to_device(torch.device("cuda"))
    launched, recorded = (_nats(model, torch.device("cuda"), recorded=way) for way in (False, True))
    torch.testing.assert_close(recorded, launched, rtol=0, atol=1e-3)
    assert abs(float((recorded - expected).mean())) < 5e-3
    assert float((recorded - expected).abs().mean()) < 5e-2
    # They do learn: the second half of the longest document is cheaper than the first.
    assert float(recorded[-450:].mean()) < float(recorded[-900:-450].mean())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_is_that_on_a_cpu() -> None:
    (sets, gradients), (fused, _) = _sets(CPU), _sets(torch.device("cuda"))
    for step, gradient in enumerate(gradients, 1):
        rounded = gradient.bfloat16()
        sets.step(slice(1, 4), rounded[1:].float(), step)
        fused.step(slice(1, 4), rounded[1:].cuda(), step)
    assert error(fused.numbers_BP.cpu(), sets.numbers_BP) < 1e-6
    assert error(fused.squares_BP.cpu(), sets.squares_BP) < 1e-6
