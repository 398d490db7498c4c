"""The stage evaluate, run as a user runs it, on an artifact packed from untrained weights."""

import json
import math
import shutil
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Experiment, stage_main
from forks import Fork

from fairway.codec.container import pack
from fairway.evaluation.collect import bpb
from fairway.evaluation.registry import evaluation_fingerprint
from fairway.model.gpt import GPT
from fairway.params import load_params
from fairway.quantization.quantize_weights import quantize_state
from fairway.runtime.files import write_atomic
from fairway.runtime.resume import ResumePoints
from fairway.tokens.validation import load_validation


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


# Sections that the default params have no need of.
SECTIONS: dict[str, dict[str, Any]] = {
    "streaming": {"block_tokens": 128, "lanes": 4, "within_documents": False},
    "lora_ttt": {
        "chunk_tokens": 64,
        "batch_documents": 2,
        "rank": 2,
        "alpha": 2.0,
        "lr": 1.0e-3,
        "beta2": 0.99,
        "weight_decay": 0.5,
        "prefix_documents": 2,
        "phases": 1,
        "global_chunk_tokens": 512,
        "global_lr": 1.0e-3,
        "global_momentum": 0.9,
        "grad_clip": 1.0,
        "carry_factors": True,
        "lanes": 1,
        "seed": 0,
    },
}


@pytest.mark.parametrize("name", ["sliding", "ttt", "slot", "streaming", "lora_ttt"])
def test_the_stage_writes_every_targets_nats_and_their_sum_in_bits_per_byte(compressed: Experiment, name: str) -> None:
    compressed.set_params(compressed.params | SECTIONS)
    compressed.stage("evaluate", "1337", name)
    nats, metrics = _outcome(compressed, name)
    validation = load_validation(compressed.folder / "artifacts/tokens", seq_len=64, vocab_size=320)
    assert (nats.dtype, nats.shape) == (np.float64, validation.bytes.shape)
    assert metrics["val_bpb"] == pytest.approx(bpb(torch.from_numpy(nats), validation.bytes), abs=1e-12)
    assert metrics["val_loss"] == pytest.approx(nats.mean(), abs=1e-12)
    counts = {"targets": len(nats), "scored": len(nats), "bytes": int(validation.bytes.sum()), "evaluator": name}
    assert {key: metrics[key] for key in counts} == counts
    # Untrained, and so about as good as a uniform guess among the 320 tokens.
    assert metrics["val_loss"] == pytest.approx(math.log(320), rel=0.1)


def test_how_many_processes_the_seconds_are_of_is_written_beside_them(compressed: Experiment) -> None:
    """Not what params.yaml asks for: torchrun may start another number by hand."""
    compressed.stage_of_processes(2, "evaluate", "1337", "sliding")
    _, metrics = _outcome(compressed, "sliding")
    assert (compressed.params["processes"], metrics["processes"], metrics["on_gpus"]) == (1, 2, False)


def test_one_evaluator_scores_twice_with_other_settings(compressed: Experiment) -> None:
    """Each under its own name: sliding with a stride of 16, and with one of a whole row."""
    compressed.set_params(compressed.params | {"sliding_64": compressed.params["sliding"] | {"stride": 64}})
    compressed.stage("evaluate", "1337", "sliding")
    output = compressed.stage("evaluate", "1337", "sliding_64").stdout
    assert "\nevaluate 1337 sliding_64: val_bpb " in output
    (often, _), (seldom, metrics) = (_outcome(compressed, name) for name in ("sliding", "sliding_64"))
    assert metrics["evaluator"] == "sliding_64"
    # The first row is the same window for both; the others begin elsewhere.
    np.testing.assert_allclose(often[:64], seldom[:64], rtol=0, atol=1e-5)
    assert abs(often[64:] - seldom[64:]).max() > 1e-4


def test_a_network_of_other_rows_than_params_name_is_checked_too(compressed: Experiment) -> None:
    """model.bin has rows of 64; params.yaml has been changed since."""
    changed = {"model": {"seq_len": 128}, "ttt": {"chunk_tokens": 1024, "stride": 128}, "sliding": {"stride": 128}}
    compressed.set_params(compressed.params | {key: compressed.params[key] | changed[key] for key in changed})
    line = compressed.fails("evaluate", "1337", "sliding")
    assert line == "error: params.yaml: sliding.stride (128) exceeds model.seq_len (64)"


def test_a_killed_evaluation_goes_on_and_ends_as_an_unkilled_one(compressed: Experiment) -> None:
    compressed.stage("evaluate", "1337", "ttt")
    whole = _outcome(compressed, "ttt")[0]
    resume = compressed.folder / "artifacts/resume/evaluate-1337-ttt"
    assert not resume.exists()
    evaluation = Fork(stage_main("evaluate", "1337", "ttt"), compressed.folder)
    while not (resume / "latest.json").exists():
        assert evaluation.is_running(), evaluation.wait()
        time.sleep(0.01)
    evaluation.kill()
    # Sections of others do not matter: the point is of this one's.
    settings = load_params(compressed.folder / "params.yaml").evaluator_settings("ttt")
    mark = evaluation_fingerprint(compressed.folder / "artifacts", 1337, "ttt", settings, processes=1)
    assert json.loads((resume / "latest.json").read_text())["fingerprint"] == mark
    shutil.rmtree(compressed.folder / "artifacts/evaluate")
    compressed.stage("evaluate", "1337", "ttt")
    np.testing.assert_array_equal(_outcome(compressed, "ttt")[0], whole)
    assert not resume.exists()


def test_points_belong_to_artifact_tokens_settings_and_processes(compressed: Experiment) -> None:
    artifacts = compressed.folder / "artifacts"

    def mark(processes: int = 1, **changes: Any) -> str:
        compressed.set_params(compressed.params | changes)
        settings = load_params(compressed.folder / "params.yaml").evaluator_settings("ttt")
        return evaluation_fingerprint(artifacts, 1337, "ttt", settings, processes=processes)

    first = mark()
    assert mark(sliding=compressed.params["sliding"] | {"stride": 8}) == first
    assert mark(ttt=compressed.params["ttt"] | {"lr": 0.5}) != first
    # Seconds of two processes and of one do not add up to those of either.
    assert mark(processes=2) != first
    again = mark(ttt=compressed.params["ttt"] | {"lr": 2.0e-3})
    assert again == first
    (artifacts / "compress/1337/model.bin").write_bytes(b"another")
    assert mark() != first


def test_points_belong_to_the_code_that_made_them(compressed: Experiment) -> None:
    code = (
        "from pathlib import Path; from fairway.params import load_params;"
        "from fairway.evaluation.registry import evaluation_fingerprint;"
        "settings = load_params('params.yaml').evaluator_settings('ttt');"
        "print(evaluation_fingerprint(Path('artifacts'), 1337, 'ttt', settings, processes=1))"
    )
    matter = (
        "fairway/model/attention.py",
        "fairway/evaluation/ttt.py",
        "fairway/adaptation/trainable.py",
        "fairway/model/precision.py",
    )
    before, train, *others = compressed.printed_as_sources_change(code, "fairway/training/loop.py", *matter)
    assert len({before, *others}) == 5
    ResumePoints(compressed.folder / "resume", before).save(3, {"nats": torch.ones(2)}, {"step": 3})
    assert ResumePoints(compressed.folder / "resume", train).load() is not None
    assert all(ResumePoints(compressed.folder / "resume", other).load() is None for other in others)


def test_a_missing_section_is_told_in_one_line(compressed: Experiment) -> None:
    line = compressed.fails("evaluate", "1337", "streaming")
    assert line == "error: params.yaml: streaming: missing section, which the evaluator of that name needs"


def test_a_network_for_another_vocabulary_is_refused_in_one_line(compressed: Experiment) -> None:
    sections = {"tokenize": {"vocab_size": 300}, "model": {"vocab_size": 300}}
    compressed.set_params(compressed.params | {key: compressed.params[key] | sections[key] for key in sections})
    _write_model(compressed)
    assert "model.bin: a network for 300 tokens, expected 320 as in" in compressed.fails("evaluate", "1337", "sliding")


def test_an_unknown_evaluator_is_told_in_one_line(experiment: Experiment) -> None:
    line = experiment.fails("evaluate", "1337", "slide")
    assert line.startswith(
        "error: slide: no such evaluator; expected one of lora_ttt, sliding, slot, streaming, ttt, or"
    )


def test_a_missing_artifact_names_the_stage_that_makes_it(experiment: Experiment) -> None:
    assert "`python -m stages.compress 1337` makes it" in experiment.fails("evaluate", "1337", "sliding")


def test_a_damaged_artifact_is_told_in_one_line(compressed: Experiment) -> None:
    path = compressed.folder / "artifacts/compress/1337/model.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "model.bin: damaged model file" in compressed.fails("evaluate", "1337", "sliding")
