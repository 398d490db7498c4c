"""Schedules against the published programs' values (golden/schedule.npz; training.md 2.6, 2.8, 2.14)."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.training.muon import MuonSettings
from fairway.training.schedule import Budget, Moment, ScheduleSettings, loop_is_on, lr_multiplier, muon_momentum

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedule.npz")
CONFIG = json.loads(GOLDEN["config_json"].tobytes())
RECORDS = ("r1150", "r1172", "r1488", "r1958")
PLAIN = ScheduleSettings(warmdown_unit="fraction", warmdown=0.5, floor=0.1, loop_from=None)


def _schedule(record: str) -> ScheduleSettings:
    warmdown = CONFIG[record]["warmdown"]
    if isinstance(warmdown, dict):
        share, floor = warmdown["frac"], warmdown["min_lr"]
        return ScheduleSettings(warmdown_unit="fraction", warmdown=share, floor=floor, loop_from=0.35)
    return ScheduleSettings(warmdown_unit="steps", warmdown=float(warmdown), floor=0.0, loop_from=None)


def _muon(momentum: float) -> MuonSettings:
    return MuonSettings(
        lr=0.025,
        weight_decay=0.04,
        momentum=momentum,
        momentum_start=0.92,
        momentum_warmup_steps=1500,
        orthogonalizer="classic",
        ns_steps=5,
        ns_association="square_first",
        row_normalize=False,
        momentum_dtype="float32",
        side_matrices=False,
    )


def _moments(record: str) -> list[Moment]:
    steps, clock_ms = GOLDEN[f"{record}/step"].tolist(), GOLDEN[f"{record}/t_ms"].tolist()
    return [Moment(step, ms / 1000) for step, ms in zip(steps, clock_ms, strict=True)]


@pytest.mark.parametrize("record", RECORDS)
def test_lr_follows_the_records_clock(record: str) -> None:
    budget = Budget(20_000, CONFIG[record]["cap_ms"] / 1000)
    ours = [lr_multiplier(_schedule(record), budget, now) for now in _moments(record)]
    np.testing.assert_allclose(ours, GOLDEN[f"{record}/lr_mult"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("record", RECORDS)
def test_lr_follows_steps_where_no_clock_runs(record: str) -> None:
    """But for step 20000 of 20000, which is never run (the programs' formula falls back to 1 there)."""
    ours = [lr_multiplier(_schedule(record), Budget(20_000, None), Moment(step, 0.0)) for step in range(0, 20_000, 250)]
    np.testing.assert_allclose(ours, GOLDEN[f"{record}/lr_mult_nocap"][:80], rtol=0, atol=2e-6)


@pytest.mark.parametrize("record", RECORDS)
def test_momentum_rises_as_in_the_records(record: str) -> None:
    muon = _muon(0.97 if record == "r1958" else 0.99)
    ours = [muon_momentum(muon, now.step) for now in _moments(record)]
    np.testing.assert_allclose(ours, GOLDEN[f"{record}/momentum"], rtol=0, atol=2e-6)


def test_depth_recurrence_begins_as_in_r1958() -> None:
    budget = Budget(20_000, CONFIG["r1958"]["cap_ms"] / 1000)
    ours = [loop_is_on(_schedule("r1958"), budget, now) for now in _moments("r1958")]
    assert ours == GOLDEN["r1958/loop_on"].astype(bool).tolist()


def test_lr_matches_the_published_log_lines() -> None:
    """PR #1150 seed 1337 logged s = 0.1498 at step 6604; PR #1958 switches its loop on at s = 0.76471."""
    r1150 = lr_multiplier(_schedule("r1150"), Budget(20_000, 600.0), Moment(6604, 555.81))
    assert r1150 == pytest.approx(0.150, abs=5e-4)
    r1958 = lr_multiplier(_schedule("r1958"), Budget(20_000, 599.5), Moment(2163, 0.35 * 599.5))
    assert r1958 == pytest.approx(0.76471, abs=1e-5)


@given(st.integers(1, 1000), st.floats(1.0, 1e4), st.integers(0, 1000), st.floats(0, 2e4))
def test_the_nearer_budget_counts(steps: int, cap_s: float, step: int, clock_s: float) -> None:
    now, both = Moment(step, clock_s), Budget(steps, cap_s)
    assert both.fraction(now) == max(step / steps, clock_s / cap_s)
    assert (both.spent(now) is None) == (step < steps and clock_s < cap_s)


@given(st.floats(0, 1))
def test_lr_never_leaves_floor_to_one_and_ends_at_the_floor(share: float) -> None:
    assert 0.1 <= lr_multiplier(PLAIN, Budget(100, 100.0), Moment(0, share * 100)) <= 1.0
    assert lr_multiplier(PLAIN, Budget(100, None), Moment(100, 0.0)) == 0.1


def test_without_a_switch_the_loop_is_always_on() -> None:
    assert loop_is_on(PLAIN, Budget(100, None), Moment(0, 0.0))
