"""Passes over the stream: interrupted and gone on with, by one process or several, with the same result."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ranks
from streams import PLAIN_FIT, PLAIN_TTT, PLAIN_WINDOWS, random_stream, shallow_network
from torch import Tensor

from fairway.evaluation import lora_ttt
from fairway.evaluation.collect import Scores, Tally, collect, measure
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttSettings
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.evaluation.slot import SlotEvaluator
from fairway.evaluation.slot_offsets import SlotFitSettings, SlotSettings
from fairway.evaluation.streaming import StreamingEvaluator, StreamingSettings
from fairway.evaluation.ttt import TttEvaluator, TttSettings
from fairway.model.gpt import GPT
from fairway.runtime.distributed import alone, start_world
from fairway.runtime.errors import UserError
from fairway.runtime.resume import ResumePoints
from fairway.tokens.tokenizer import BOS

CPU = torch.device("cpu")
WINDOWS: dict[str, Any] = {"stride": 4, "batch_windows": 2} | PLAIN_WINDOWS
TTT = WINDOWS | {"chunk_tokens": 32, "epochs": 2, "lr": 0.05, "momentum": 0.9, "grad_clip": 1.0, "batch_rows": 32}
TTT |= PLAIN_TTT | {"freeze_blocks": 1}
SLOT = WINDOWS | PLAIN_FIT | {"steps": 3, "lr": 0.01, "carried": False}
APART: dict[str, Any] = {"within_documents": True}
LORA: dict[str, Any] = {"chunk_tokens": 4, "batch_documents": 2, "rank": 2, "alpha": 4.0, "lr": 0.01, "beta2": 0.99}
LORA |= {"weight_decay": 0.5, "prefix_documents": 8, "phases": 2, "global_chunk_tokens": 64, "global_lr": 0.02}
LORA |= {"global_momentum": 0.9, "grad_clip": 1.0, "carry_factors": True, "lanes": 4, "seed": 0}
ALONE = LORA | {"carry_factors": False, "prefix_documents": 0, "phases": 0}
EVALUATORS: dict[str, Evaluator] = {
    "sliding": SlidingEvaluator(SlidingSettings(**WINDOWS)),
    "published": SlidingEvaluator(SlidingSettings(**(WINDOWS | {"published_window_list": True}))),
    "ttt": TttEvaluator(TttSettings(**TTT)),
    "ttt_bfloat16": TttEvaluator(TttSettings(**TTT)),
    "ttt_slot": TttEvaluator(TttSettings(**(TTT | {"slot": SlotFitSettings(**PLAIN_FIT, steps=2, lr=0.01)}))),
    "slot": SlotEvaluator(SlotSettings(**SLOT)),
    "carried": SlotEvaluator(SlotSettings(**(SLOT | {"bias": True, "carried": True}))),
    "streaming": StreamingEvaluator(StreamingSettings(block_tokens=4, lanes=4, within_documents=False)),
    "lora_ttt": LoraTttEvaluator(LoraTttSettings(**LORA)),
    "lora_ttt_alone": LoraTttEvaluator(LoraTttSettings(**ALONE)),
    "documents": SlidingEvaluator(SlidingSettings(**(WINDOWS | APART))),
    "ttt_documents": TttEvaluator(TttSettings(**(TTT | APART))),
    "slot_documents": SlotEvaluator(SlotSettings(**(SLOT | APART | {"fitted_on": "context"}))),
    "carried_documents": SlotEvaluator(SlotSettings(**(SLOT | APART | {"bias": True, "carried": True}))),
    "streaming_documents": StreamingEvaluator(StreamingSettings(block_tokens=4, lanes=4, **APART)),
}
EVERY = pytest.mark.parametrize("name", EVALUATORS)


def network(name: str) -> GPT:
    """What the evaluator of that name scores with; in bfloat16, a gradient depends on which rows it is taken of."""
    model = shallow_network()
    model.compute_dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    return model


def stream() -> Tensor:
    """Two hundred targets in thirty documents."""
    tokens = random_stream(9, 200)
    tokens[torch.arange(30) ** 2 * 200 // 900] = BOS
    return tokens


class Interruption(Exception):
    """Stands for whatever ends a run early."""


def _run(name: str, points: ResumePoints | None = None, *, batches: int | None = None) -> tuple[Scores, int]:
    """Scores of one evaluator and the number of batches seen; interrupted behind that many `batches`."""
    model, tokens, seen = network(name), stream(), 0

    def scored(positions: Tensor, nats: Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen == batches:
            raise Interruption

    evaluation = EVALUATORS[name].begin(model, tokens, alone(CPU))
    return collect(evaluation, tokens, alone(CPU), scored=scored, points=points), seen


@cache
def whole_run(name: str) -> tuple[Scores, int]:
    """Scores of one evaluator that nothing interrupts, and its number of batches."""
    return _run(name)


@EVERY
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(name: str, tmp_path: Path) -> None:
    whole, batches = whole_run(name)
    points = ResumePoints(tmp_path, "this one")
    with pytest.raises(Interruption):
        _run(name, points, batches=batches - 2)
    resumed, after = _run(name, points)
    assert torch.equal(resumed.nats_N, whole.nats_N)
    assert torch.equal(resumed.times_N, whole.times_N)
    # What was restored comes as one batch.
    assert after < batches - 2
    assert resumed.earlier_s > 0


def test_a_point_of_another_evaluation_is_not_taken_up(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        _run("sliding", ResumePoints(tmp_path, "this one"), batches=20)
    assert _run("sliding", ResumePoints(tmp_path, "another"))[1] == whole_run("sliding")[1]


@EVERY
def test_every_target_is_scored_once_but_for_the_published_list(name: str) -> None:
    times = whole_run(name)[0].times_N
    assert int(times.min()) == 1
    assert int(times.max()) == (4 if name == "published" else 1)


@pytest.fixture(autouse=True)
def chunks_of_four_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that depend on no other come in more than one chunk then, though there are few."""
    monkeypatch.setattr(lora_ttt, "CHUNK_BATCHES", 4)


# TTT learns between seven chunks, SLOT with a carried offset between three, or four where documents are kept apart. The
# batches of documents take 16 steps of their adapters in all, and there are two phases.
UPDATES = {"ttt": 6, "ttt_bfloat16": 6, "ttt_slot": 6, "carried": 2, "lora_ttt": 16 + 2}
UPDATES |= {"lora_ttt_alone": 16, "ttt_documents": 6, "carried_documents": 3}


@EVERY
def test_a_pass_tells_how_often_it_learns_something_for_later(name: str) -> None:
    assert EVALUATORS[name].begin(network(name), stream(), alone(CPU)).updates == UPDATES.get(name, 0)


def test_what_learns_nothing_has_no_updates() -> None:
    idle: list[Evaluator] = [
        TttEvaluator(TttSettings(**(TTT | {"epochs": 0}))),
        SlotEvaluator(SlotSettings(**(SLOT | {"bias": True, "carried": True, "steps": 0}))),
    ]
    for evaluator in idle:
        evaluation = evaluator.begin(network("ttt"), stream(), alone(CPU))
        assert (evaluation.chunks > 1, evaluation.updates) == (True, 0)


@pytest.mark.parametrize("left_out", [[2, 3, 4, 8], [11]])
def test_targets_that_no_evaluator_scored_are_counted_and_the_first_is_named(left_out: list[int]) -> None:
    told = (
        f"{len(left_out)} of 12 targets were never scored, the first of them token {left_out[0] + 1} of the validation"
    )
    tally, scored = Tally(12), torch.tensor([position for position in range(12) if position not in left_out])
    tally.add(scored, torch.ones(len(scored), dtype=torch.float64))
    sums_N, times_N = tally.over_ranks(alone(CPU))
    with pytest.raises(UserError, match=told):
        measure(Scores(sums_N / times_N, times_N, 0.0), torch.ones(12, dtype=torch.int64))


def score_as_one_of_several() -> None:
    """Leave the scores of every evaluator in the current folder."""
    with start_world() as world:
        tokens = stream()
        for name, evaluator in EVALUATORS.items():
            evaluation = evaluator.begin(network(name), tokens, world)
            scores = collect(evaluation, tokens, world, scored=lambda positions, nats: None)
            if world.rank == 0:
                torch.save((scores.nats_N, scores.times_N), f"{name}.pt")


@pytest.fixture(scope="module")
def of_three_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tensor, Tensor]]:
    """What three processes make of every evaluator."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(score_as_one_of_several, folder, processes=3)
    return lambda name: torch.load(folder / f"{name}.pt")


@EVERY
def test_three_processes_give_the_result_of_one(
    name: str, of_three_processes: Callable[[str], tuple[Tensor, Tensor]]
) -> None:
    """To 1e-6 bits per token; a matrix product depends on the threads that share it."""
    alone_, (nats, times) = whole_run(name)[0], of_three_processes(name)
    assert torch.equal(times, alone_.times_N)
    assert abs(float(nats.mean() - alone_.nats_N.mean())) / math.log(2) <= 1e-6
    torch.testing.assert_close(nats, alone_.nats_N, rtol=0, atol=1e-3)
