"""Adaptation before quantization against PR #1488 and #1958 (golden/ttt.npz; evaluate.md 6), and its stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Experiment
from forks import ranks
from streams import checksums, golden, golden_network, golden_tokens, lively_network, random_stream
from torch import Tensor

from fairway.adaptation.row_training import AdaptSettings, adapt, epoch_lr, load_rows
from fairway.adaptation.trainable import trainable
from fairway.model.gpt import GPT
from fairway.params import load_params
from fairway.runtime.distributed import World, start_world
from fairway.runtime.errors import UserError
from fairway.runtime.files import load_tensors, save_tensors
from fairway.tokens.shards import write_shard

SETTINGS: dict[str, Any] = {"epochs": 2, "split": "train", "lr": 4.5e-3, "lr_floor": 0.1, "batch_rows": 3}
SETTINGS |= {"grad_clip": 1.0, "freeze_blocks": 1, "max_rows": None, "freeze": "blocks", "freeze_tokens": False}
SETTINGS |= {"lanes": 1, "coupling": "step", "fake_quantize": "none"}


R1958 = {
    "lr": 5e-3,
    "batch_rows": 2,
    "freeze_blocks": 2,
    "freeze": "vectors",
    "freeze_tokens": True,
    "coupling": "epoch",
}


def _settings(**changes: Any) -> AdaptSettings:
    return AdaptSettings(**(SETTINGS | changes))


def _rows(tokens: Tensor, seq_len: int) -> Tensor:
    return tokens.unfold(0, seq_len + 1, seq_len)


def _silent(_: int) -> None:
    pass


# The programs' runs (golden/ttt.npz): their ranks are our lanes.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "prequant_r1488/plain_R1": ("r1488", {}),
    "prequant_r1488/plain_R2": ("r1488", {"lanes": 2}),
    "prequant_r1958/R1": ("r1958", R1958),
    "prequant_r1958/R2": ("r1958", R1958 | {"lanes": 2}),
}


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_weights_match_the_records(run: str) -> None:
    arrays, (record, changes) = golden("ttt"), RUNS[run]
    settings = _settings(**changes)
    rows = _rows(golden_tokens("ttt", f"prequant_{record}/stream"), 48)
    model = golden_network(record, 48)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = adapt(model, rows, settings, _silent)
    steps = [arrays[f"{run}/loss_rank{lane}"].reshape(2, -1) for lane in range(settings.lanes)]
    sizes = _rows_of_steps(len(rows), settings)
    expected = sum(step @ size for step, size in zip(steps, sizes, strict=True)) / len(rows)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    moved = checksums(model, start, arrays["config"][f"prequant_{record}/checksum_names"])
    np.testing.assert_allclose(moved, arrays[f"{run}/checksum_after_epoch"][1], rtol=0.03, atol=1e-2)


def _rows_of_steps(rows: int, settings: AdaptSettings) -> list[np.ndarray]:
    """How many rows each step of each lane has: of a run of its own, or of every lanes-th batch."""
    whole = np.arange(rows)
    if settings.coupling == "epoch":
        batches = [len(part) for part in torch.arange(rows).split(settings.batch_rows)]
        return [np.array(batches[lane :: settings.lanes]) for lane in range(settings.lanes)]
    runs = np.array_split(whole, settings.lanes)
    return [np.array([len(part) for part in torch.tensor(run).split(settings.batch_rows)]) for run in runs]


def test_fake_quantized_losses_match_pr_1488() -> None:
    """A weight near the middle between two codes may fall to either side, so later steps only agree roughly."""
    arrays = golden("ttt")
    rows = _rows(golden_tokens("ttt", "prequant_r1488/stream"), 48)
    losses = adapt(golden_network("r1488", 48), rows, _settings(fake_quantize="all"), _silent)
    steps = arrays["prequant_r1488/fakequant_R1/loss_rank0"].reshape(2, 5)
    np.testing.assert_allclose(losses, steps @ _rows_of_steps(14, _settings())[0] / 14, rtol=0, atol=5e-2)


def test_the_learning_rate_falls_as_published() -> None:
    """PR #1488: 4.50e-4, 4.40e-4, ..., 5.5e-5 over ten epochs."""
    settings = _settings(lr=4.5e-4, epochs=10)
    assert [epoch_lr(settings, epoch) for epoch in (0, 1, 9)] == pytest.approx([4.5e-4, 4.4e-4, 5.5e-5], rel=5e-3)


def test_the_last_rows_are_taken_across_shards(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"train_{shard:06d}.bin", np.arange(10 * shard, 10 * shard + 10, dtype=np.uint16))
    sizes = {"seq_len": 4, "vocab_size": 30}
    assert load_rows(tmp_path, "train", **sizes, max_rows=3)[:, 0].tolist() == [17, 21, 25]
    assert load_rows(tmp_path, "train", **sizes, max_rows=3)[-1].tolist() == [25, 26, 27, 28, 29]
    whole = load_rows(tmp_path, "train", **sizes)
    assert whole[:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert torch.equal(load_rows(tmp_path, "train", **sizes, max_rows=100), whole)


def test_only_the_first_blocks_stay_as_they_were() -> None:
    model, before = lively_network(), lively_network().state_dict()
    adapt(model, _rows(random_stream(1, 64), 16), _settings(freeze_blocks=2, epochs=1), _silent)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} >= {"embed", "layer2", "layer10"}
    assert not {name for name in moved if name.startswith(("layer0.", "layer1."))}
    free = trainable(model, freeze_blocks=2, freeze="blocks")
    assert {name for name, _ in free} == {name for name in before if not name.startswith(("layer0.", "layer1."))}


def test_two_runs_give_the_same_weights() -> None:
    rows, first, second = _rows(random_stream(2, 160), 16), lively_network(), lively_network()
    assert adapt(first, rows, _settings(), _silent) == adapt(second, rows, _settings(), _silent)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_every_epoch_loses_less_on_the_same_rows() -> None:
    losses = adapt(lively_network(), _rows(random_stream(2, 160), 16), _settings(epochs=3), _silent)
    assert losses == sorted(losses, reverse=True)


def adapt_as_one_of_several() -> None:
    """Leave losses and weights by coupling in the current folder."""
    with start_world() as world:
        for coupling in ("step", "epoch"):
            losses, weights = adapted(coupling, world)
            if world.rank == 0:
                torch.save((losses, weights), f"{coupling}.pt")


def adapted(coupling: Any, world: World | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a small run in three lanes."""
    model, rows = lively_network(), _rows(random_stream(2, 208), 16)
    losses = adapt(model, rows, _settings(lanes=3, coupling=coupling, batch_rows=2), _silent, world=world)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they made of `adapted`."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(adapt_as_one_of_several, folder, processes=2)
    return folder


@pytest.mark.parametrize("coupling", ["step", "epoch"])
def test_two_processes_give_the_result_of_one(coupling: str, of_two_processes: Path) -> None:
    losses, weights = adapted(coupling, None)
    theirs, their_weights = torch.load(of_two_processes / f"{coupling}.pt")
    assert theirs == pytest.approx(losses, abs=1e-5)
    for name, weight in weights.items():
        # A bfloat16 weight may be rounded to the other side.
        tolerance = 2.0**-7 * float(weight.abs().max()) if weight.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(their_weights[name], weight, rtol=0, atol=tolerance)


def test_more_processes_than_lanes_are_refused() -> None:
    world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"adapt.lanes \(1\) is less than the 2 processes"):
        adapt(lively_network(), _rows(random_stream(2, 64), 16), _settings(), _silent, world=world)


def test_bfloat16_tables_are_rounded_after_every_step() -> None:
    """Updates far below their last digit vanish, as they do in the records."""
    model, rows = lively_network(), _rows(random_stream(2, 64), 16)
    before = model.embed.token.detach().clone()
    adapt(model, rows, _settings(lr=1e-6, epochs=1), _silent)
    assert model.embed.token.dtype == torch.bfloat16
    assert float((model.embed.token != before).float().mean()) < 0.05


@pytest.fixture
def averaged(experiment: Experiment, tokenized: Experiment) -> Experiment:
    """An experiment with tokens and with averaged weights, which are the initial ones."""
    shutil.copytree(tokenized.folder / "artifacts", experiment.folder / "artifacts")
    model = GPT(load_params(experiment.folder / "params.yaml").model)
    model.init_weights(1)
    save_tensors(experiment.folder / "artifacts/average/1337/weights.safetensors", model.state_dict())
    return experiment


def _weights(experiment: Experiment, stage: str) -> dict[str, Tensor]:
    return load_tensors(experiment.folder / f"artifacts/{stage}/1337/weights.safetensors", "")


def _report(experiment: Experiment) -> dict[str, Any]:
    return json.loads((experiment.folder / "artifacts/adapt/1337/adapt.json").read_text())


def test_no_epochs_pass_the_weights_through(averaged: Experiment) -> None:
    averaged.set_params(averaged.params | {"adapt": SETTINGS | {"epochs": 0}})
    averaged.stage("adapt", "1337")
    before, after = _weights(averaged, "average"), _weights(averaged, "adapt")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    made = {"split": "train", "epochs": 0, "adapt_s": 0, "loss_nats": [], "processes": 1, "on_gpus": False}
    assert _report(averaged) | {"adapt_s": 0} == made


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_stage_trains_on_its_split_and_says_so(averaged: Experiment, split: str) -> None:
    averaged.set_params(averaged.params | {"adapt": SETTINGS | {"split": split, "batch_rows": 16}})
    averaged.stage("adapt", "1337")
    report, weights = _report(averaged), _weights(averaged, "adapt")
    assert (report["split"], report["epochs"], len(report["loss_nats"])) == (split, 2, 2)
    assert report["loss_nats"][1] < report["loss_nats"][0]
    before = _weights(averaged, "average")
    assert not any(torch.equal(value, before[name]) for name, value in weights.items() if name.startswith("layer1.mlp"))


def test_only_the_first_of_several_processes_prints_and_it_writes_how_many_they_are(averaged: Experiment) -> None:
    averaged.set_params(averaged.params | {"adapt": SETTINGS | {"lanes": 2, "batch_rows": 16}})
    first, second = averaged.stage_of_processes(2, "adapt", "1337")
    assert first.startswith("adapt 1337: ")
    assert second == ""
    assert _report(averaged)["processes"] == 2


def test_weights_of_another_network_are_refused_in_one_line(averaged: Experiment) -> None:
    averaged.set_params(averaged.params | {"adapt": SETTINGS, "model": averaged.params["model"] | {"mlp_hidden": 48}})
    assert (
        "average/1337/weights.safetensors: not weights of the network in params.yaml (model): size mismatch for layer0"
        in (averaged.fails("adapt", "1337"))
    )


def test_missing_weights_are_told_in_one_line(experiment: Experiment) -> None:
    assert "`python -m stages.average 1337` makes it" in experiment.fails("adapt", "1337")
