"""The whole record in one run: what its settings ask of the processes is looked at before it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import Experiment
from forks import ranks
from test_evaluate import SECTIONS

from fairway.evaluation.registry import make_evaluator
from fairway.params import Params
from fairway.runtime.errors import UserError
from fairway.whole_record import Inputs, run_record

STREAMING, LORA = SECTIONS["streaming"], SECTIONS["lora_ttt"]


@pytest.mark.parametrize(
    ("changes", "evaluator", "refused"),
    [
        ({"adapt": {"epochs": 1, "lanes": 1}}, "sliding", "adapt.lanes (1) is less than the 2 processes"),
        ({"streaming": {"lanes": 1}}, "streaming", "streaming.lanes (1) is less than the 2 processes"),
        ({"lora_ttt": {"lanes": 1}}, "lora_ttt", "lora_ttt.lanes (1) is less than the 2 processes"),
        ({"streaming": {"lanes": 1000}}, "streaming", "streaming.lanes (1000): too many for "),
    ],
)
def test_what_does_not_fit_the_processes_is_told_before_training(
    changes: dict[str, Any], evaluator: str, refused: str, tokenized: Experiment, tmp_path: Path
) -> None:
    """The settings were checked for one process when they were read or packed, and then two are started."""
    raw = tokenized.params | SECTIONS
    params = Params.model_validate(raw | {section: raw[section] | keys for section, keys in changes.items()})
    made = make_evaluator(evaluator, params.evaluator_settings(evaluator), model=params.model, processes=1)
    tokens = tokenized.folder / "artifacts/tokens"

    def run() -> None:
        with pytest.raises(UserError) as told:
            run_record(params, Inputs(7, tokens, tokens / "tokenizer.model"), made)
        print(told.value)
        # A process that ended here would break off the other's joining, if that is still under way.
        dist.barrier()

    first, second = (done.stdout for done in ranks(run, tmp_path, processes=2))
    assert f"params.yaml: {refused}" in first
    assert f"params.yaml: {refused}" in second
    assert "step:" not in first


def test_a_missing_packing_program_is_told_before_training(
    tokenized: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tokenized.params
    params = Params.model_validate(raw | {"compress": raw["compress"] | {"codec": "lrzip"}})
    made = make_evaluator("sliding", params.evaluator_settings("sliding"), model=params.model, processes=1)
    tokens = tokenized.folder / "artifacts/tokens"
    monkeypatch.setenv("PATH", str(tmp_path))

    def run() -> None:
        with pytest.raises(UserError) as told:
            run_record(params, Inputs(7, tokens, tokens / "tokenizer.model"), made)
        print(told.value)

    (alone,) = (done.stdout for done in ranks(run, tmp_path, processes=1))
    assert "params.yaml: compress.codec: lrzip is not installed" in alone
    assert "step:" not in alone
