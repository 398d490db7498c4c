"""The score of quantized weights on rows of one window: the same measure as training's own."""

import json
from typing import Any

import pytest
import torch
from conftest import Experiment

from fairway.codec.codes import load_codes
from fairway.params import Params
from fairway.quantization.quantized_rows import quantized_rows_bpb
from fairway.runtime.errors import UserError
from fairway.runtime.files import load_tensors


def _bpb(made: Experiment, state: dict[str, Any], **changes: Any) -> float:
    params = Params.model_validate(made.params | {"train": made.params["train"] | changes})
    path, tokens = made.folder / "artifacts/weights", made.folder / "artifacts/tokens"
    return quantized_rows_bpb(params.model, params.train, state, path, tokens, torch.device("cpu"))


def _last(made: Experiment) -> dict[str, Any]:
    weights = load_tensors(made.folder / "artifacts/train/1337/last.safetensors", "train")
    return {name: weight.half() for name, weight in weights.items()}


def _figures(made: Experiment, path: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((made.folder / "artifacts" / path).read_text())
    return figures


def test_weights_that_were_not_rounded_score_as_training_says(finished: Experiment) -> None:
    assert _bpb(finished, _last(finished)) == pytest.approx(
        _figures(finished, "train/1337/train.json")["val_bpb"], abs=1e-4
    )


def test_the_stage_scores_the_codes_that_it_writes(finished: Experiment) -> None:
    found = _figures(finished, "quantize/1337/quantize.json")["quantized_rows_bpb"]
    assert found == pytest.approx(_bpb(finished, load_codes(finished.folder / "artifacts/quantize/1337")), abs=1e-9)
    kept = _figures(finished, "train/1337/train.json")["val_bpb_by_weights"]["ema_0.95"]
    assert found != kept
    assert found == pytest.approx(kept, abs=2e-3)


def test_documents_are_kept_apart_where_training_keeps_them_apart(finished: Experiment) -> None:
    apart = _bpb(finished, _last(finished), loader={"kind": "packed", "bucket": 16})
    assert apart == pytest.approx(_bpb(finished, _last(finished)), abs=0.1)
    assert apart != _bpb(finished, _last(finished))


def test_the_size_of_a_pass_does_not_matter(finished: Experiment) -> None:
    longer = _bpb(finished, _last(finished), micro_batch_tokens=512)
    assert longer == pytest.approx(_bpb(finished, _last(finished)), abs=1e-5)


def test_weights_of_another_network_are_refused(finished: Experiment) -> None:
    state = _last(finished)
    state.pop("embed.token")
    with pytest.raises(UserError, match=r"artifacts/weights: not weights of the network in params\.yaml"):
        _bpb(finished, state)
