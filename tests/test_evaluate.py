"""The stage evaluate, run as a user runs it, on an artifact packed from untrained weights."""

import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Experiment

from model.gpt import GPT
from stages.compress.container import pack
from stages.evaluate.bpb import bpb
from stages.files import write_atomic
from stages.params import load_params
from stages.quantize.state import quantize_state
from stages.tokenize.validation import load_validation


@pytest.fixture
def compressed(experiment: Experiment, tokenized: Experiment) -> Experiment:
    """An experiment with tokens and with a model.bin."""
    shutil.copytree(tokenized.folder / "artifacts", experiment.folder / "artifacts")
    _write_model(experiment)
    return experiment


def _write_model(experiment: Experiment) -> None:
    params = load_params(experiment.folder / "params.yaml")
    model = GPT(params.model)
    model.init_weights(1)
    state, _ = quantize_state(model.state_dict(), params.quantize)
    write_atomic(experiment.folder / "artifacts/compress/1337/model.bin", pack(params.model, state, codec="brotli"))


def _outcome(experiment: Experiment, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    folder = experiment.folder / f"artifacts/evaluate/1337/{name}"
    return np.load(folder / "nats.npz")["nats"], json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["sliding", "ttt", "slot"])
def test_the_stage_writes_every_targets_nats_and_their_sum_in_bits_per_byte(compressed: Experiment, name: str) -> None:
    compressed.stage("evaluate", "1337", name)
    nats, metrics = _outcome(compressed, name)
    validation = load_validation(compressed.folder / "artifacts/tokens", seq_len=64, vocab_size=320)
    assert (nats.dtype, nats.shape) == (np.float64, validation.bytes.shape)
    assert metrics["val_bpb"] == pytest.approx(bpb(torch.from_numpy(nats), validation.bytes), abs=1e-12)
    assert metrics["val_loss"] == pytest.approx(nats.mean(), abs=1e-12)
    counts = {"targets": len(nats), "bytes": int(validation.bytes.sum()), "evaluator": name}
    assert {key: metrics[key] for key in counts} == counts
    # Untrained, and so about as good as a uniform guess among the 320 tokens.
    assert metrics["val_loss"] == pytest.approx(math.log(320), rel=0.1)


@pytest.mark.parametrize("name", ["ttt"])
def test_two_runs_give_the_same_numbers(compressed: Experiment, name: str) -> None:
    compressed.stage("evaluate", "1337", name)
    first = _outcome(compressed, name)[0]
    compressed.stage("evaluate", "1337", name)
    np.testing.assert_array_equal(_outcome(compressed, name)[0], first)


def test_a_network_for_another_vocabulary_is_refused_in_one_line(compressed: Experiment) -> None:
    sections = {"tokenize": {"vocab_size": 300}, "model": {"vocab_size": 300}}
    compressed.set_params(compressed.params | {key: compressed.params[key] | sections[key] for key in sections})
    _write_model(compressed)
    assert "model.bin: a network for 300 tokens, expected 320 as in" in compressed.fails("evaluate", "1337", "sliding")


def test_an_unknown_evaluator_is_told_in_one_line(experiment: Experiment) -> None:
    line = experiment.fails("evaluate", "1337", "slide")
    assert line.startswith("error: slide: no such evaluator; expected one of sliding, ttt, slot")


def test_a_missing_artifact_names_the_stage_that_makes_it(experiment: Experiment) -> None:
    assert "`python -m stages.compress 1337` makes it" in experiment.fails("evaluate", "1337", "sliding")


def test_a_damaged_artifact_is_told_in_one_line(compressed: Experiment) -> None:
    path = compressed.folder / "artifacts/compress/1337/model.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "model.bin: damaged model file" in compressed.fails("evaluate", "1337", "sliding")
