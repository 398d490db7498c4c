"""What training and evaluation show while they go on: how far they are, and how long they will still take."""

import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.evaluation.collect import RunningScore
from fairway.runtime import progress
from fairway.runtime.distributed import World
from fairway.runtime.progress import Figures, Progress, TrainLog


class HandSetClock:
    """Stands for the module time where progress reads it, so that a test of minutes takes none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 5000.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandSetClock:
    """The time that progress lines are reckoned by."""
    return HandSetClock(monkeypatch)


def _figures(clock_s: float) -> Figures:
    return {"train_loss": 2.5, "clock_s": clock_s}


def test_a_resumed_run_limited_by_the_clock_tells_the_seconds_that_are_left(
    tmp_path: Path, clock: HandSetClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed at 400 of 600 seconds, 11 seconds ago: 189 are left. The 400 seconds were not run in these 11."""
    with TrainLog(tmp_path, steps=100_000, seconds=600.0) as log:
        log.tick(4001, _figures(400.2))
        clock.now_s += 11
        log.tick(4111, _figures(411.2))
        assert capsys.readouterr().out == "train: 411/600 s, 11 s, 189 s left loss=2.5\n"


def test_a_resumed_run_limited_by_steps_judges_its_speed_by_its_own_steps(
    tmp_path: Path, clock: HandSetClock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainLog(tmp_path, steps=100, seconds=None) as log:
        log.tick(61, _figures(300.0))
        clock.now_s += 20
        log.tick(65, _figures(320.0))
        assert capsys.readouterr().out == "train: 65/100 steps, 20 s, 175 s left loss=2.5\n"


def test_the_last_line_has_the_last_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainLog(tmp_path, steps=4, seconds=None) as log:
        log.log(0, {"val_bpb": 8.0})
        for step in range(1, 5):
            log.tick(step, _figures(float(step)))
        log.log(4, {"val_bpb": 2.5})
    assert capsys.readouterr().out.endswith(" val_bpb=2.5 loss=2.5\n")


def test_a_process_with_more_than_its_part_counts_up_to_the_whole_and_no_further(
    clock: HandSetClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight lanes of two rows among three processes: this one has three lanes, six of the sixteen rows."""
    with Progress("adapt", 16, unit="rows", processes=3) as shown:
        for _ in range(2):
            clock.now_s += 10
            shown.update(2)
        assert capsys.readouterr().out == "adapt: 6/16 rows, 10 s, 17 s left\nadapt: 12/16 rows, 20 s, 7 s left\n"
        shown.update(2)
    assert capsys.readouterr().out == "adapt: 16/16 rows, 20 s\n"


def test_how_long_it_will_take_is_not_told_by_the_first_unit(
    clock: HandSetClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder has read its whole context before its first token."""
    with Progress("certify", 2000, unit="tokens", every_s=1.0) as shown:
        for units, seconds in ((1, 50), (19, 1)):
            clock.now_s += seconds
            shown.update(units)
        assert capsys.readouterr().out == "certify: 1/2000 tokens, 50 s\ncertify: 20/2000 tokens, 51 s, 5049 s left\n"


@given(st.integers(1, 100), st.integers(1, 8), st.lists(st.integers(0, 20)))
def test_no_count_exceeds_its_total(total: int, processes: int, steps: list[int]) -> None:
    with redirect_stdout(StringIO()), Progress("adapt", total, unit="rows", processes=processes) as shown:
        for step in steps:
            shown.update(step)
    assert shown.done == min(sum(steps) * processes, total)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_resumed_evaluation_judges_its_speed_by_what_it_scores_itself(
    processes: int, clock: HandSetClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed at 600 of 1,000 tokens, which all processes together scored; 100 more in 20 seconds leave 60 s."""
    world = World(rank=0, size=processes, device=torch.device("cpu"))
    mine_N = torch.arange(0, 1000, processes)
    nats_N = torch.full(mine_N.shape, math.log(2), dtype=torch.float64)
    restored, scored = 600 // processes, 700 // processes
    with RunningScore("evaluate", torch.ones(1000, dtype=torch.int64), world, every_s=0.0) as running:
        running.add(mine_N[:restored], nats_N[:restored])
        clock.now_s += 20
        running.add(mine_N[restored:scored], nats_N[restored:scored])
        assert capsys.readouterr().out == "evaluate: 700/1000 tokens, 20 s, 60 s left bpb=1\n"
