"""The stage certify, run as a user runs it, and the coder beneath it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Experiment
from reports import Figures
from stand_in_lrzip import install

from fairway.codec.container import pack, unpack
from fairway.runtime.errors import UserError
from fairway.runtime.files import read_figures

CONDITIONS = ["causality", "normalisation", "score_first", "single_pass", "decoder", "accounting"]


def _certificate(experiment: Experiment, name: str) -> dict[str, Any]:
    experiment.stage("certify", "1337", name)
    return json.loads((experiment.folder / f"artifacts/certify/1337/{name}/certificate.json").read_text())


def test_an_artifact_trained_on_the_validation_text_fails_whatever_scores_it(finished_copy: Experiment) -> None:
    """As its adapt.json says. Of one that was not, every condition passes: test_pipeline.py."""
    record = finished_copy.folder / "artifacts/adapt/1337/adapt.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"split": "validation", "epochs": 2}))
    finished_copy.stage("evaluate", "1337", "sliding")
    found = _certificate(finished_copy, "sliding")
    assert (found["evaluator"], found["legal"], list(found["conditions"])) == ("sliding", False, CONDITIONS)
    failed = {name: condition for name, condition in found["conditions"].items() if condition["verdict"] == "fail"}
    assert set(failed) == {"causality", "score_first", "single_pass", "decoder"}
    assert "trained on the validation text" in failed["causality"]["why"]
    assert found["conditions"]["accounting"]["evidence"]["adapt_split"] == "validation"
    assert found["certify_s"] > 0


def test_evaluation_and_certificate_unpack_the_artifact_once_each(
    finished_copy: Experiment, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished_copy.folder / "artifacts/compress/1337/model.bin"
    runs = install(tmp_path_factory.mktemp("lrzip"), monkeypatch)
    config, state = unpack(path.read_bytes())
    path.write_bytes(pack(config, state, codec="lrzip"))
    packed = runs.read_text().split()
    for stage in ("evaluate", "certify"):
        runs.unlink()
        finished_copy.stage(stage, "1337", "sliding")
        assert runs.read_text().split() == ["unpack"] * len(packed)


def test_a_missing_evaluation_names_the_stage_that_makes_it(finished_copy: Experiment) -> None:
    assert "`python -m stages.evaluate 1337 sliding` makes it" in finished_copy.fails("certify", "1337", "sliding")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON object"),
        (b'{"split": ', "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no split"),
    ],
)
def test_damaged_figures_are_told_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapt.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"adapt\.json: {message}; run `adapt` again$"):
        read_figures(tmp_path / "adapt.json", "adapt", ("split",))


@pytest.mark.parametrize(
    ("file", "made_by"),
    [
        ("train/1337/train.json", "train 1337"),
        ("train/1337/live/plots/metrics/val_bpb.tsv", "train 1337"),
        ("evaluate/1337/slot/metrics.json", "evaluate 1337 slot"),
        ("evaluate/1337/slot/nats.npz", "evaluate 1337 slot"),
    ],
)
def test_a_damaged_file_in_a_report_names_the_command_that_makes_it(
    file: str, made_by: str, tmp_path: Path, evaluated: Experiment
) -> None:
    figures = Figures(tmp_path, evaluated)
    path = tmp_path / "artifacts" / file
    # A table is cut behind the first field of a line.
    path.write_bytes(path.read_bytes()[:-9] if path.suffix != ".tsv" else path.read_bytes() + b"12")
    with pytest.raises(UserError, match=rf"{re.escape(file)}: .*; run `python -m stages\.{made_by}` again$"):
        figures.facts()
