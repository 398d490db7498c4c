"""Evaluators found by name: one file each, under its own name or with a suffix."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_params

import fairway.evaluation
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.lora_ttt import LoraTttEvaluator
from fairway.evaluation.registry import evaluator_class, evaluator_kinds, is_evaluator, make_evaluator, settings_class
from fairway.evaluation.sliding import SlidingEvaluator, SlidingSettings
from fairway.evaluation.slot import SlotEvaluator
from fairway.evaluation.slot_offsets import SlotSettings
from fairway.evaluation.ttt import TttEvaluator
from fairway.params import Params
from fairway.runtime.errors import UserError

KINDS = ["lora_ttt", "sliding", "slot", "streaming", "ttt"]
EVALUATOR = """
from dataclasses import dataclass

from pydantic import Field

from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings


class {name}Settings(EvaluatorSettings):
    size: int = Field(gt=0)

    def check(self, *, section, model, processes):
        if self.size > model.seq_len:
            raise ValueError(f"{{section}}.size ({{self.size}}) exceeds model.seq_len ({{model.seq_len}})")


@dataclass(frozen=True)
class {name}(Evaluator):
    settings: {settings}

    def begin(self, model, tokens_N1, world):
        raise NotImplementedError
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are modules of fairway.evaluation as well, for the time of a test."""
    before = set(sys.modules)
    monkeypatch.setattr(fairway.evaluation, "__path__", [*fairway.evaluation.__path__, str(tmp_path)])
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("fairway.evaluation."):
            del sys.modules[name]
            delattr(fairway.evaluation, name.rpartition(".")[2])


def test_every_file_with_an_evaluator_is_a_kind() -> None:
    assert evaluator_kinds() == KINDS
    assert not any(
        is_evaluator(name) for name in ("windows", "evaluator", "slide", "beam_sliding", "slot__8", "sliding_")
    )
    assert not any(is_evaluator(name) for name in ("Sliding", "sliding-8", "../sliding", "", "_sliding", "sliding_8\n"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sliding", SlidingEvaluator),
        ("sliding_512", SlidingEvaluator),
        ("ttt_slow_2", TttEvaluator),
        ("lora_ttt_long", LoraTttEvaluator),
        # slot_carried.py is a part of slot, and no evaluator of its own.
        ("slot_carried", SlotEvaluator),
    ],
)
def test_a_name_is_a_kind_with_or_without_a_suffix(name: str, expected: type[Evaluator]) -> None:
    assert evaluator_class(name) is expected


def test_a_section_is_read_as_the_settings_of_its_kind() -> None:
    assert (settings_class("slot"), settings_class("sliding_512")) == (SlotSettings, SlidingSettings)
    raw = tiny_params(Path("corpus.jsonl"))
    raw |= {"evaluators": ["sliding", "sliding_32"], "sliding_32": raw["sliding"] | {"stride": 32}}
    del raw["slot"]
    params = Params.model_validate(raw)
    strides = {name: params.evaluator_settings(name).model_dump()["stride"] for name in params.evaluators}
    assert strides == {"sliding": 16, "sliding_32": 32}
    assert {"sliding", "sliding_32", "ttt"} <= set(params.model_dump())
    with pytest.raises(UserError, match=r"params\.yaml: slot: missing section, which the evaluator of that name needs"):
        params.evaluator_settings("slot")
    with pytest.raises(UserError, match=f"^slide: no such evaluator; expected one of {', '.join(KINDS)}, or one"):
        params.evaluator_settings("slide")


def test_a_new_file_is_a_new_kind(package: Path) -> None:
    (package / "beam.py").write_text(EVALUATOR.format(name="Beam", settings="BeamSettings"))
    (package / "beam_deep.py").write_text(EVALUATOR.format(name="Deep", settings="DeepSettings"))
    assert evaluator_kinds() == ["beam", "beam_deep", *KINDS]
    found = {name: evaluator_class(name).__name__ for name in ("beam", "beam_4", "beam_deep", "beam_deep_4")}
    assert found == {"beam": "Beam", "beam_4": "Beam", "beam_deep": "Deep", "beam_deep_4": "Deep"}
    raw = tiny_params(Path("corpus.jsonl")) | {"evaluators": ["sliding", "beam_4"], "beam_4": {"size": 4}}
    params = Params.model_validate(raw)
    settings = params.evaluator_settings("beam_4")
    assert type(make_evaluator("beam_4", settings, model=params.model, processes=1)) is evaluator_class("beam")
    with pytest.raises(ValueError, match=r"beam_4.size \(65\) exceeds model.seq_len \(64\)"):
        Params.model_validate(raw | {"beam_4": {"size": 65}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            EVALUATOR.format(name="One", settings="OneSettings") + EVALUATOR.format(name="Two", settings="TwoSettings"),
            "fairway/evaluation/beam.py defines several evaluators (One, Two); expected one",
        ),
        (
            EVALUATOR.format(name="One", settings="dict"),
            "fairway.evaluation.beam: One.settings: expected an annotation with a subclass of EvaluatorSettings",
        ),
        ("SIZE = 4\n", "beam: no such evaluator; expected one of"),
    ],
)
def test_a_file_that_defines_no_evaluator_of_its_own_is_told(package: Path, text: str, expected: str) -> None:
    (package / "beam.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(expected)):
        settings_class("beam")


def test_an_evaluator_without_settings_of_its_own_has_an_empty_section(package: Path) -> None:
    text = EVALUATOR.format(name="Beam", settings="BeamSettings").replace("    settings: BeamSettings\n", "")
    (package / "beam.py").write_text(text)
    assert settings_class("beam") is EvaluatorSettings
    raw: dict[str, Any] = tiny_params(Path("corpus.jsonl")) | {"beam": {}}
    assert Params.model_validate(raw).evaluator_settings("beam") == EvaluatorSettings()
