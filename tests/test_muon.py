"""Muon against the published programs (golden/muon.npz; training.md 2.7, 2.8, 2.12) and against torch.optim.Muon."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from fairway.runtime.distributed import World, alone
from fairway.training.gradients import Gradients, Stack, clip_factor
from fairway.training.muon import Muon, MuonSettings, coefficients, normalize_rows, orthogonalize

GOLDEN = np.load(Path(__file__).parent / "golden" / "muon.npz")
CONFIG = json.loads(GOLDEN["config_json"].tobytes())
ALONE = alone(torch.device("cpu"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of theirs."""
    return float((ours.float() - theirs).norm() / theirs.norm())


def _change(stack: Stack, start: Tensor) -> Tensor:
    return torch.stack([p.detach() for p in stack.parameters]) - start


def muon_settings(record: str, **changes: Any) -> MuonSettings:
    """The record's Muon; lr and decay as in golden/muon.npz."""
    config = CONFIG["records"].get(record, {"lr": 0.02, "wd": 0.1, "rn": False})
    chosen = {
        "lr": config["lr"],
        "weight_decay": config["wd"],
        "momentum": 0.95,
        "momentum_start": 0.85,
        "momentum_warmup_steps": 100,
        "orthogonalizer": "polar_express" if record == "r1958" else "classic",
        "ns_steps": 5,
        "row_normalize": config["rn"],
        "ns_association": "scale_first" if record == "r1488" else "square_first",
        "momentum_dtype": "float32",
        "side_matrices": False,
    }
    return MuonSettings(**chosen | changes)


@pytest.mark.parametrize("kind", ["classic", "classic2d", "polar"])
@pytest.mark.parametrize(("shape", "precision"), [*product(["tall", "wide", "square"], DTYPES), ("lowrank", "fp32")])
def test_orthogonalizer_matches_the_published_ones(shape: str, kind: str, precision: str) -> None:
    iterations = coefficients("polar_express" if kind == "polar" else "classic", 5)
    ours = orthogonalize(golden(f"ns/{shape}/in"), iterations, dtype=DTYPES[precision], scale_first=kind == "classic2d")
    limit = 8e-2 if precision == "bf16" else 1e-3 if shape == "lowrank" else 1e-4
    assert deviation(ours, golden(f"ns/{shape}/{kind}_{precision}")) < limit


@pytest.mark.parametrize(("kind", "orthogonalizer"), [("classic3", "classic"), ("polar3", "polar_express")])
def test_fewer_iterations_are_the_first_ones(kind: str, orthogonalizer: str) -> None:
    ours = orthogonalize(golden("ns/square/in"), coefficients(orthogonalizer, 3), dtype=torch.float32)
    assert deviation(ours, golden(f"ns/square/{kind}_fp32")) < 1e-4


@pytest.mark.parametrize(
    ("orthogonalizer", "expected"),
    [
        ("classic", [0.048473, 0.470544, 1.110357, 0.698917, 1.122332, 0.712120, 1.079592, 0.722876, 0.696436]),
        ("polar_express", [0.098806, 0.858873, 0.966383, 1.027110, 1.060512, 1.059161, 0.983142, 0.871286, 0.859129]),
    ],
)
def test_singular_values_map_as_tabled(orthogonalizer: str, expected: list[float]) -> None:
    """training.md 2.7: the scalar map of a normalised singular value, exact arithmetic."""
    sigma = torch.tensor([1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    for a, b, c in coefficients(orthogonalizer, 5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    np.testing.assert_allclose(sigma, expected, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 12), st.integers(-6, 6))
def test_orthogonalizer_ignores_scale_and_keeps_zero(seed: int, rows: int, columns: int, power: int) -> None:
    G = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    G[1] = 0
    iterations = coefficients("polar_express", 5)
    out = orthogonalize(G, iterations, dtype=torch.float32)
    assert torch.equal(out[1], G[1])
    torch.testing.assert_close(orthogonalize(G * 2.0**power, iterations, dtype=torch.float32), out, atol=2e-3, rtol=0)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("record", ["r1150", "r1172", "r1488", "r1958"])
@pytest.mark.parametrize("bank", ["qo", "kv", "up", "down"])
def test_three_steps_match_the_published_updates(bank: str, record: str, precision: str) -> None:
    # The banked records keep gradients and momentum in bfloat16 too, PR #1488 only computes in it.
    banked = precision == "bf16" and record != "r1488"
    record_settings = muon_settings(record, momentum_dtype="bfloat16" if banked else "float32")
    start = golden(f"upd/{bank}/W0")
    stack = Stack([(str(i), Parameter(matrix.clone())) for i, matrix in enumerate(start)], ALONE)
    muon = Muon([stack], record_settings, ALONE, compute_dtype=DTYPES[precision])
    for k, (scale, momentum) in enumerate(zip(CONFIG["lr_multipliers"], CONFIG["records"][record]["mom"], strict=True)):
        stack.total.copy_(golden(f"upd/{bank}/grad{k}"))
        muon.launch()
        muon.step(lr_scale=scale, momentum=momentum)
        name = f"upd/{bank}/{record}_{precision}/W{k + 1}"
        if name in GOLDEN and precision == "fp32":
            assert deviation(_change(stack, start), golden(name) - start) < 1e-4
    change = _change(stack, start)
    expected = golden(f"upd/{bank}/{record}_{precision}/W3") - start
    assert deviation(change, expected) < (1e-4 if precision == "fp32" else 6e-2)
    assert float(change.norm() / expected.norm()) == pytest.approx(1, abs=1e-2)
    if record != "r1172":
        momentum3 = golden(f"upd/{bank}/{record}_{precision}/mom3")
        assert deviation(muon.momenta[0], momentum3) < (1e-6 if precision == "fp32" else 1e-2)


def test_a_factor_on_one_matrix_gradient_changes_nothing() -> None:
    """PR #1172's early and late learning rates scale gradients, which the orthogonalizer undoes (training.md 2.9)."""
    start = golden("upd/qo/W0")
    stack = Stack([(str(i), Parameter(matrix.clone())) for i, matrix in enumerate(start)], ALONE)
    muon = Muon([stack], muon_settings("r1172"), ALONE, compute_dtype=torch.float32)
    for k, (scale, momentum) in enumerate(
        zip(CONFIG["lr_multipliers"], CONFIG["records"]["r1172"]["mom"], strict=True)
    ):
        stack.total.copy_(golden(f"upd/qo/grad{k}"))
        stack.total[0::2] *= CONFIG["split"]["factor"]
        muon.launch()
        muon.step(lr_scale=scale, momentum=momentum)
    change = _change(stack, start)
    assert deviation(change, golden("upd/qo/r1172_split_fp32/W3") - start) < 1e-4
    assert deviation(change, golden("upd/qo/r1172_fp32/W3") - start) < 1e-4


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_agrees_with_torch(shape: tuple[int, int]) -> None:
    """torch keeps (1 - mu) V, a scale that the orthogonalizer undoes; it always computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    theirs, ours = Parameter(start.clone()), Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original")
    stack = Stack([("w", ours)], ALONE)
    muon = Muon([stack], muon_settings("torch"), ALONE, compute_dtype=torch.bfloat16)
    for _ in range(3):
        grad = torch.randn(shape, generator=generator)
        theirs.grad = grad.clone()
        reference.step()
        stack.total[0] = grad
        muon.launch()
        muon.step(lr_scale=1.0, momentum=0.9)
    assert deviation(ours.detach() - start, theirs.detach() - start) < 2e-2


def test_rows_are_normalised_and_zero_rows_stay() -> None:
    U = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    torch.testing.assert_close(normalize_rows(U), torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


@pytest.mark.parametrize("case", ["clipped", "unclipped"])
def test_clipping_matches_the_published_one(case: str) -> None:
    parameters = [Parameter(golden(f"clip/{case}/in{i}")) for i in (0, 1)]
    groups = {"matrix": [("a", parameters[0])], "table": [("b", parameters[1])], "scalar": []}
    gradients = Gradients(groups, ALONE, micro_batches=1)
    for p in parameters:
        p.grad = p.detach().clone()
    gradients.add(0.3)
    torch.testing.assert_close(gradients.norms.norm()[None], golden(f"clip/{case}/norm"))
    torch.testing.assert_close(gradients.norm[None], golden(f"clip/{case}/norm"))
    torch.testing.assert_close(gradients.views[parameters[0]], golden(f"clip/{case}/out0"))
    torch.testing.assert_close(gradients.views[parameters[1]], golden(f"clip/{case}/out1"))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(1e-3, 10))
def test_no_gradient_leaves_longer_than_the_limit(values: list[float], limit: float) -> None:
    g = torch.tensor(values)
    assert float((g * clip_factor(g.norm(), limit)).norm()) <= limit * (1 + 1e-5)


def test_momentum_survives_a_change_of_the_number_of_ranks() -> None:
    """State is by name: two ranks' padded shares hold what one rank holds."""
    names = ("a", "b", "c")
    members = [(name, Parameter(torch.zeros(4, 2))) for name in names]
    tensors = {name: torch.full((4, 2), float(i + 1)) for i, name in enumerate(names)}
    shares = []
    for rank in (0, 1):
        world = World(rank=rank, size=2, device=torch.device("cpu"))
        muon = Muon([Stack(members, world)], muon_settings("r1150"), world, compute_dtype=torch.float32)
        muon.load_tensors(tensors)
        shares.append(muon.momenta[0])
    whole = torch.cat(shares)
    assert [float(m[0, 0]) for m in whole] == [1.0, 2.0, 3.0, 0.0]
