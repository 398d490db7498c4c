"""SLOT against the published programs (golden/slot.npz; evaluate.md 4) and against its literal form by autograd."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    PLAIN_FIT,
    PLAIN_WINDOWS,
    golden,
    golden_network,
    golden_tokens,
    lively_network,
    random_stream,
    shallow_network,
    sliding,
)
from torch import Tensor

from fairway.evaluation.scoring import Batch, make_batch
from fairway.evaluation.slot import FITTED_ON, OffsetHead, SlotEvaluator
from fairway.evaluation.slot_carried import CarriedPass
from fairway.evaluation.slot_offsets import Offsets, SlotFitSettings, SlotSettings, step_lr
from fairway.evaluation.windows import in_groups, published, scored_once
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone

CPU = torch.device("cpu")
RECORDS = {
    "r1150_fp32": SlotFitSettings(**PLAIN_FIT, steps=5, lr=3e-3),
    "r1172_fp32": SlotFitSettings(**PLAIN_FIT, steps=8, lr=5e-3),
    "r1488": SlotFitSettings(steps=24, lr=0.012, lr_end=1e-3, fitted_on="scored", bias=True),
}
SLOT: dict[str, Any] = {"stride": 4, "batch_windows": 3, "steps": 5, "lr": 0.05}
SLOT |= PLAIN_FIT | PLAIN_WINDOWS | {"carried": False}


def _evaluator(**changes: Any) -> SlotEvaluator:
    return SlotEvaluator(SlotSettings(**(SLOT | changes)))


def _silent(_: int) -> None:
    pass


def _golden_batch(variant: str, index: int) -> tuple[GPT, Batch, Tensor]:
    """The network, batch and hidden state (B, T, D) of a golden variant, checked against it."""
    arrays, model = golden("slot"), golden_network(variant[:5], 32)
    windows = in_groups(published(64, seq_len=32, stride=8), 4)[index]
    batch = make_batch(golden_tokens("slot", "stream"), windows, seq_len=32)
    np.testing.assert_array_equal(batch.targets_BX, arrays[f"{variant}/batch{index}/targets"])
    with torch.no_grad():
        hid_BTD = model.hidden(batch.tokens_BT)
    np.testing.assert_allclose(hid_BTD, arrays[f"{variant}/batch{index}/hidden"], rtol=0, atol=1e-3)
    return model, batch, hid_BTD


def _nats(logits_MV: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits_MV, batch.targets_BX.flatten()[batch.rows_M], reduction="none")


@pytest.mark.parametrize("variant", RECORDS)
@pytest.mark.parametrize("index", [0, 1])
def test_offsets_and_nats_match_the_record(variant: str, index: int) -> None:
    expected = {
        name: golden("slot")[f"{variant}/batch{index}/{name}"] for name in ("delta", "final_nll", "scored_mask")
    }
    model, batch, hid_BTD = _golden_batch(variant, index)
    head = OffsetHead(RECORDS[variant], CPU)
    with torch.no_grad():
        offsets, logits_MV = head.fit(model, batch, hid_BTD), head(model, batch, hid_BTD)
    np.testing.assert_allclose(offsets.delta_GD, expected["delta"][:, 0], rtol=0, atol=1e-4)
    if offsets.biased:
        bias = golden("slot")[f"{variant}/batch{index}/bias"]
        np.testing.assert_allclose(offsets.bias_GV, bias[:, 0], rtol=0, atol=1e-4)
    scored = expected["scored_mask"] == 1
    np.testing.assert_allclose(_nats(logits_MV, batch), expected["final_nll"][scored], rtol=0, atol=1e-3)


@pytest.mark.parametrize("record", ["r1150", "r1172"])
def test_the_bfloat16_originals_differ_only_by_their_rounding(record: str) -> None:
    model, batch, hid_BTD = _golden_batch(f"{record}_fp32", 0)
    with torch.no_grad():
        nats = _nats(OffsetHead(RECORDS[f"{record}_fp32"], CPU)(model, batch, hid_BTD), batch)
    scored = golden("slot")[f"{record}_fp32/batch0/scored_mask"] == 1
    assert float(nats.mean()) == pytest.approx(
        golden("slot")[f"{record}_bf16/batch0/final_nll"][scored].mean(), abs=1e-2
    )


@pytest.mark.parametrize(("step", "lr"), [(0, 0.012), (1, 0.011953), (12, 0.0065), (22, 0.001187), (23, 0.001047)])
def test_the_learning_rate_of_pr_1488(step: int, lr: float) -> None:
    assert step_lr(RECORDS["r1488"], step) == pytest.approx(lr, abs=5e-7)


def test_the_fitted_places_of_pr_1488_are_counted_as_published() -> None:
    """Full batch of 32 windows with stride 96: 3072; the batch that holds the first window: 5024."""
    windows = scored_once(62_021_632, seq_len=2048, stride=96)
    tokens = torch.zeros(2048 + 64 * 96, dtype=torch.int64)
    for begin, count in ((0, 5024), (1, 3072)):
        places = FITTED_ON["scored"](make_batch(tokens, windows[begin : begin + 32], seq_len=2048))
        assert int((places.weight_GP > 0).sum()) == count
        assert float(places.weight_GP.max()) == pytest.approx(1 / count)


def literal_logits(model: GPT, batch: Batch, hid_BTD: Tensor, fit: SlotFitSettings) -> Tensor:
    """SLOT written down literally: h + δ through the head at every place, backward, torch's AdamW. Logits (B, T, V)."""
    windows, (B, T, D) = batch.windows, hid_BTD.shape
    offset_T, first_B1, length_B1 = torch.arange(T), windows.first[:, None], windows.length[:, None]
    counted_BT = {
        "batch": (offset_T < T - 1).expand(B, T),
        "scored": (offset_T >= first_B1) & (offset_T < length_B1),
        "context": offset_T < first_B1,
    }[fit.fitted_on]
    groups = 1 if fit.fitted_on == "batch" else B
    delta = torch.zeros(groups, 1, D, requires_grad=True)
    bias = torch.zeros(groups, 1, model.config.vocab_size, requires_grad=fit.bias)

    def logits() -> Tensor:
        u_BTV = (hid_BTD + delta) @ model.embed.token.detach().float().T + bias
        return model.config.softcap * torch.tanh(u_BTV / model.config.softcap)

    optimizer = torch.optim.AdamW([delta, bias] if fit.bias else [delta], lr=fit.lr, weight_decay=1e-8, eps=1e-5)
    for step in range(fit.steps):
        optimizer.param_groups[0]["lr"] = step_lr(fit, step)
        optimizer.zero_grad()
        nats_BT = F.cross_entropy(logits().flatten(0, 1), batch.targets_BX.flatten(), reduction="none").view(B, T)
        ((nats_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)).backward()
        optimizer.step()
    return logits().detach()


@settings(max_examples=24, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 90),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from(sorted(FITTED_ON)),
    st.booleans(),
    st.sampled_from([None, 1e-3]),
)
def test_the_closed_form_equals_the_literal_one(
    seed: int, targets: int, batch_windows: int, steps: int, fitted_on: Any, bias: bool, lr_end: float | None
) -> None:
    """Total nats within 1e-4, whatever the form."""
    model, tokens = shallow_network(), random_stream(seed, targets)
    fit = SlotFitSettings(steps=steps, lr=0.01, lr_end=lr_end, fitted_on=fitted_on, bias=bias)
    for windows in in_groups(scored_once(targets, seq_len=16, stride=4), batch_windows)[:2]:
        batch = make_batch(tokens, windows, seq_len=16)
        with torch.no_grad():
            hid_BTD = model.hidden(batch.tokens_BT)
            found = OffsetHead(fit, CPU)(model, batch, hid_BTD)
        expected = literal_logits(model, batch, hid_BTD, fit).flatten(0, 1)[batch.rows_M]
        assert abs(float((_nats(found, batch).double() - _nats(expected, batch).double()).sum())) <= 1e-4


def test_adamw_matches_torch() -> None:
    model, generator = lively_network(), torch.Generator().manual_seed(1)
    offsets = Offsets(model, 2, SlotFitSettings(**(PLAIN_FIT | {"steps": 6, "lr": 0.02, "bias": True})))
    delta, bias = torch.zeros(2, 32, requires_grad=True), torch.zeros(2, 40, requires_grad=True)
    optimizer = torch.optim.AdamW([delta, bias], lr=0.02, weight_decay=1e-8, eps=1e-5)
    for _ in range(6):
        gamma_GV = 1e-3 * torch.randn(2, 40, generator=generator)
        offsets.step(model, gamma_GV, 0.02)
        delta.grad, bias.grad = gamma_GV @ model.embed.token.detach().float(), gamma_GV.clone()
        optimizer.step()
    torch.testing.assert_close(offsets.delta_GD, delta.detach())
    torch.testing.assert_close(offsets.bias_GV, bias.detach())


def test_a_carried_offset_equals_its_literal_form() -> None:
    """Score a chunk, then AdamW steps by autograd on that chunk's mean loss, with one optimizer for the stream."""
    model, tokens = shallow_network(), random_stream(4, 200)
    slot = SlotSettings(**(SLOT | {"carried": True, "bias": True}))
    windows = scored_once(200, seq_len=16, stride=4)
    evaluation = CarriedPass(model, tokens, windows, alone(CPU), slot)
    delta, bias = torch.zeros(32, requires_grad=True), torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.AdamW([delta, bias], lr=0.05, weight_decay=1e-8, eps=1e-5)
    assert evaluation.chunks > 1
    for chunk, group in enumerate(in_groups(windows, 8 * 3)):
        found = torch.cat([logits for _, logits in evaluation.predict(chunk)])
        evaluation.learn(chunk)
        batch = make_batch(tokens, group, seq_len=16)
        hid_MD = model.hidden(batch.tokens_BT).detach().flatten(0, 1)[batch.rows_M]
        for step in range(6):
            logits_MV = 30 * torch.tanh(((hid_MD + delta) @ model.embed.token.detach().float().T + bias) / 30)
            if step == 0:
                torch.testing.assert_close(found, logits_MV.detach(), rtol=0, atol=1e-4)
            if step < 5:
                optimizer.zero_grad()
                _nats(logits_MV, batch).mean().backward()
                optimizer.step()


@pytest.mark.parametrize(
    "changes", [{"fitted_on": "context"}, {"carried": True}, {"fitted_on": "context", "bias": True}]
)
def test_the_causal_forms_do_not_see_later_tokens(changes: dict[str, Any]) -> None:
    model, slot = shallow_network(), _evaluator(**changes)
    for seed in range(6):
        tokens, cut = random_stream(seed, 160), 5 + 25 * seed
        changed = torch.cat([tokens[:cut], random_stream(seed + 1, 160)[cut:]])
        before, after = (slot.score(model, stream, _silent) for stream in (tokens, changed))
        assert torch.equal(before[: cut - 1], after[: cut - 1])
        before, after = (slot.log_probs(model, stream, [cut - 1]) for stream in (tokens, changed))
        assert torch.equal(before, after)


@pytest.mark.parametrize("changes", [{}, {"fitted_on": "scored", "bias": True}])
def test_the_records_forms_depend_on_the_target_they_predict(changes: dict[str, Any]) -> None:
    """Why their figure is not a code length: changing only the token that is scored changes its own prediction."""
    model, tokens, position = lively_network(), random_stream(5, 80), 40
    changed = tokens.clone()
    changed[position + 1] = (changed[position + 1] + 1) % 38 + 2
    before, after = (_evaluator(**changes).log_probs(model, stream, [position]) for stream in (tokens, changed))
    assert float((before - after).abs().max()) > 1e-4


@pytest.mark.parametrize("changes", [{}, {"fitted_on": "scored"}, {"fitted_on": "context"}, {"carried": True}])
def test_without_steps_slot_is_sliding(changes: dict[str, Any]) -> None:
    model, tokens = shallow_network(), random_stream(3, 80)
    plain = sliding(stride=4, batch_windows=3)
    found = _evaluator(steps=0, **changes).score(model, tokens, _silent)
    torch.testing.assert_close(found, plain.score(model, tokens, _silent), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"fitted_on": "context"}, {"carried": True}])
def test_the_causal_forms_learn_a_skewed_stream(changes: dict[str, Any]) -> None:
    model = shallow_network()
    tokens = torch.randint(2, 5, (401,), generator=torch.Generator().manual_seed(1))
    plain = sliding(stride=4, batch_windows=3).score(model, tokens, _silent)
    found = _evaluator(bias=True, steps=20, **changes).score(model, tokens, _silent)
    assert float(found[200:].mean()) < float(plain[200:].mean()) - 0.1


@pytest.mark.parametrize("within_documents", [False, True])
def test_windows_without_places_to_fit_on_are_refused(within_documents: bool) -> None:
    chosen, row = _evaluator(fitted_on="context", within_documents=within_documents).settings, lively_network().config
    chosen.check(section="slot", model=row, processes=1)
    whole = chosen.model_copy(update={"stride": 16})
    with pytest.raises(ValueError, match=r"^slot.stride \(16\): expected less than model.seq_len \(16\)") as told:
        whole.check(section="slot", model=row, processes=1)
    assert "\n" not in str(told.value)


def test_the_model_is_left_as_it_was() -> None:
    model, tokens = lively_network(), random_stream(7, 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _evaluator().score(model, tokens, _silent)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
