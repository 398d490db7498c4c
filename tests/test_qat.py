"""Quantization-aware training: the published roundings (golden/gptq_rtn.npz), and that they do take effect."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_params
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairway.model.gpt import GPT
from fairway.model.precision import row_scales, soft_round, straight_through
from fairway.params import Params
from fairway.training.qat import QatSettings, Rounded, rounding_begins
from fairway.training.run import compiled_forward

GOLDEN = np.load(Path(__file__).parent / "golden" / "gptq_rtn.npz")
RECORDS: dict[str, Any] = {"bits": 6, "min_clip": 1.0}
CPU = torch.device("cpu")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[f"fakequant/{name}"])


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("r1150", lambda W: straight_through(W, **RECORDS)),
        ("r1172_alpha1", lambda W: soft_round(W, torch.tensor(1.0), **RECORDS)),
        ("r1172_alpha6", lambda W: soft_round(W, torch.tensor(6.0), **RECORDS)),
        ("r1172_alpha16", lambda W: soft_round(W, torch.tensor(16.0), **RECORDS)),
    ],
)
def test_roundings_and_their_gradients_are_the_published_ones(name: str, rounding: Any) -> None:
    W = golden("W").requires_grad_()
    y = golden("x") @ rounding(W).T
    (y * golden("dy")).sum().backward()
    torch.testing.assert_close(y.detach(), golden(f"{name}/y"), atol=1e-5, rtol=1e-4)
    assert W.grad is not None
    torch.testing.assert_close(W.grad, golden(f"{name}/dW"), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 8))
def test_soft_rounding_hardens_into_rounding(seed: int, bits: int) -> None:
    W = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed))
    hard = straight_through(W, bits=bits, min_clip=0.0)
    soft = soft_round(W, torch.tensor(1e6), bits=bits, min_clip=0.0)
    scales = row_scales(W, bits=bits, min_clip=0.0)
    # Half-way between two codes the soft one stays there.
    decided = ((W / scales).frac().abs() - 0.5).abs() > 1e-3
    torch.testing.assert_close(soft[decided], hard[decided], atol=1e-5, rtol=0)
    assert bool(((hard - W).abs() <= 0.5001 * scales).all())


def qat(kind: str, **changes: Any) -> QatSettings:
    chosen = {"kind": kind, "below_lr": 0.5, "min_step": 2, "ramp_steps": 10, **RECORDS}
    return QatSettings.model_validate(chosen | changes)


def network() -> tuple[GPT, Tensor, Tensor]:
    """A small network with every matrix in play, and a batch."""
    model = GPT(Params.model_validate(tiny_params(Path("corpus.jsonl"))).model)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    tokens = torch.randint(0, 320, (2, 65), generator=generator)
    return model, tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["ste", "soft"])
def test_rounding_takes_effect_at_every_step(kind: str, graph: bool) -> None:
    """The published switch did nothing once compiled: here the loss differs, and follows a change of sharpness."""
    model, inputs, targets = network()
    rounded = Rounded(model, qat(kind), CPU)
    forward = compiled_forward(rounded.forward, backend="eager") if graph else rounded.forward
    plain = model(inputs, targets).item()
    losses = []
    for steps in (0, 5, 10):
        rounded.harden(steps)
        losses.append(forward(inputs, targets, segments=None, looped=True).item())
    assert all(abs(loss - plain) > 1e-4 for loss in losses)
    assert len(set(losses)) == (3 if kind == "soft" else 1)


@pytest.mark.parametrize("kind", ["ste", "soft"])
def test_every_matrix_still_gets_its_gradient(kind: str) -> None:
    model, inputs, targets = network()
    Rounded(model, qat(kind), CPU).forward(inputs, targets, segments=None, looped=True).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_the_loss_is_that_of_rounded_weights() -> None:
    model, inputs, targets = network()
    rounded = Rounded(model, qat("ste"), CPU)
    loss = rounded.forward(inputs, targets, segments=None, looped=True)
    with torch.no_grad():
        for name in rounded.names:
            p = model.get_parameter(name)
            p.copy_(straight_through(p, **RECORDS))
    torch.testing.assert_close(model(inputs, targets), loss)


def test_rounding_begins_late_and_not_before_its_step() -> None:
    cases = [(1, 0.1), (2, 0.5), (2, 0.49), (900, 1.0)]
    assert [rounding_begins(qat("soft"), step, lr_scale) for step, lr_scale in cases] == [False, False, True, False]


def test_packed_rows_of_any_number_of_documents_share_one_graph() -> None:
    """Otherwise training would stop to compile whenever a row has more documents than any before."""
    # Takes a second to import.
    from torch._dynamo.testing import CompileCounter

    model, inputs, targets = network()
    counter = CompileCounter()
    forward = compiled_forward(model, backend=counter)
    for documents in (3, 9, 17):
        bounds = torch.linspace(0, inputs.numel(), documents).int()
        row = inputs.reshape(1, -1), targets.reshape(1, -1)
        loss = forward(*row, segments=bounds, looped=True)
        torch.testing.assert_close(loss, model(*row, segments=bounds, looped=True))
    assert counter.frame_count == 1
