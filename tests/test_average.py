"""Averages of the weights: golden/schedule.npz, closed forms, and the choice among what training kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from fairway.runtime.errors import UserError
from fairway.runtime.files import save_tensors
from fairway.training.averages import AverageSettings, Ema, Swa, kept_weights

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedule.npz")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MADE_BY = "python -m stages.train 1"


def _set(p: Parameter, value: Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("record", "decay"), [("r1150", 0.997), ("r1958", 0.9965)])
def test_ema_matches_the_published_one(record: str, decay: float, precision: str) -> None:
    """training.md 2.13: kept in float32 whatever the parameter's dtype, cast to that at the end."""
    name = f"ema/{record}/{precision}"
    sequence = torch.from_numpy(GOLDEN[f"{name}/sequence"]).to(DTYPES[precision])
    p = Parameter(sequence[0].clone())
    ema = Ema({"w": p}, decay)
    for k, value in enumerate(sequence[1:], start=1):
        _set(p, value)
        ema.update()
        torch.testing.assert_close(ema.mean["w"], torch.from_numpy(GOLDEN[f"{name}/after{k}"]), atol=2e-6, rtol=0)
    assert ema.weights()["w"].dtype == p.dtype
    if f"{name}/final_cast" in GOLDEN:
        torch.testing.assert_close(ema.weights()["w"].float(), torch.from_numpy(GOLDEN[f"{name}/final_cast"]))


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(0.01, 0.999))
def test_ema_is_its_closed_form(values: list[float], decay: float) -> None:
    p = Parameter(torch.tensor(values[0]))
    ema = Ema({"w": p}, decay)
    for value in values[1:]:
        _set(p, torch.tensor(value))
        ema.update()
    n = len(values) - 1
    weights = [decay**n] + [(1 - decay) * decay ** (n - k) for k in range(1, n + 1)]
    assert float(ema.mean["w"]) == pytest.approx(np.dot(weights, values), abs=1e-4)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_swa_is_the_mean(values: list[float]) -> None:
    p = Parameter(torch.zeros(()))
    swa = Swa({"w": p})
    assert swa.weights() == {}
    for value in values:
        _set(p, torch.tensor(value))
        swa.collect()
    assert swa.count == len(values)
    assert float(swa.weights()["w"]) == pytest.approx(np.mean(values), abs=1e-4)


def test_averages_do_not_follow_the_parameter_they_were_copied_from() -> None:
    p = Parameter(torch.zeros(2))
    ema, swa = Ema({"w": p}, 0.5), Swa({"w": p})
    swa.collect()
    _set(p, torch.ones(2))
    assert float(ema.mean["w"].sum()) == float(swa.mean["w"].sum()) == 0.0


@pytest.mark.parametrize(("method", "kind"), [("ema", "ema_0.98"), ("swa", "swa"), ("last", "last")])
def test_each_method_takes_its_own_weights(tmp_path: Path, method: str, kind: str) -> None:
    for i, name in enumerate(("ema_0.98", "ema_0.9", "swa", "last")):
        save_tensors(tmp_path / f"{name}.safetensors", {name: torch.full((2,), i, dtype=torch.bfloat16)})
    average = AverageSettings.model_validate({"method": method, "ema_decay": 0.98})
    weights = kept_weights(tmp_path, average, made_by=MADE_BY)
    assert list(weights) == [kind]
    assert weights[kind].dtype == torch.bfloat16


def test_weights_that_were_not_collected_are_an_error(tmp_path: Path) -> None:
    save_tensors(tmp_path / "last.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(UserError, match=r"average\.method: swa needs .*swa\.safetensors; training kept only last"):
        kept_weights(tmp_path, AverageSettings(method="swa", ema_decay=0.98), made_by=MADE_BY)


def test_a_seed_that_was_not_trained_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no such file; `{MADE_BY}` makes it"):
        kept_weights(tmp_path / "7", AverageSettings(method="last", ema_decay=0.98), made_by=MADE_BY)
