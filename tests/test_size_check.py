"""The scales: bytes are counted on the files that ship, and too many of them stop the pipeline with a useful line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Experiment
from stand_in_lrzip import install

from fairway.codec.artifact import over_cap, weigh
from fairway.codec.codes import QuantizedState
from fairway.codec.container import pack
from fairway.model.gpt import GPT
from fairway.params import Params
from fairway.quantization.quantize_weights import quantization_report, quantize_state

SEED = "1337"


def _quantized(params: Params) -> tuple[QuantizedState, dict[str, dict[str, Any]]]:
    """Codes, and the figures by tensor that quantize.json has."""
    model = GPT(params.model)
    model.init_weights(1337)
    weights = {name: torch.randn(weight.shape) for name, weight in model.state_dict().items()}
    state, chosen = quantize_state(weights, params.quantize)
    return state, quantization_report(weights, state, chosen, params.quantize)


def _model_file(params: Params, codec: str = "brotli") -> bytes:
    return pack(params.model, _quantized(params)[0], codec=codec)


@pytest.fixture
def shipped(experiment: Experiment) -> Experiment:
    """An experiment folder with two files to weigh."""
    folder = experiment.folder / "artifacts/compress" / SEED
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(_model_file(Params.model_validate(experiment.params)))
    (folder / "train_gpt.py").write_text("print()\n")
    return experiment


def test_the_parts_sum_to_the_files(experiment: Experiment) -> None:
    params = Params.model_validate(experiment.params)
    model = _model_file(params)
    size = weigh(b"x" * 1000, model, cap_bytes=100_000)
    assert size["total_bytes"] == 1000 + len(model)
    assert size["headroom_bytes"] == 100_000 - 1000 - len(model)
    parts = [facts["bytes"] for facts in size["classes"].values()]
    assert sum(parts) + size["float16"]["bytes"] + size["header_bytes"] == len(model)
    assert sum(size["parts"].values()) == size["total_bytes"]
    assert size["weights"] == sum(weight.numel() for weight in GPT(params.model).state_dict().values())


def test_bits_per_weight_stand_beside_their_entropy(experiment: Experiment) -> None:
    """The entropy of each matrix stands in quantize.json."""
    params = Params.model_validate(experiment.params)
    figures = _quantized(params)[1].values()
    size = weigh(b"", _model_file(params), cap_bytes=1)
    for kind, facts in size["classes"].items():
        codes = [(math.prod(f["shape"]), f["entropy_bits"]) for f in figures if f["class"] == kind and f["bits"] < 16]
        assert sum(count for count, _ in codes) == facts["weights"]
        assert 3 < sum(count * bits for count, bits in codes) / facts["weights"] < facts["bits_per_weight"]


def test_weighing_unpacks_nothing(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = install(tmp_path, monkeypatch)
    model = _model_file(Params.model_validate(experiment.params), codec="lrzip")
    assert "unpack" not in runs.read_text()
    size = weigh(b"", model, cap_bytes=1)
    assert size["model_bytes"] == len(model)
    assert "unpack" not in runs.read_text()


def test_the_stage_writes_what_the_report_reads(shipped: Experiment) -> None:
    shipped.stage("size_check", SEED)
    size = json.loads((shipped.folder / f"artifacts/size_check/{SEED}/size.json").read_text())
    files = [shipped.folder / f"artifacts/compress/{SEED}/{name}" for name in ("model.bin", "train_gpt.py")]
    assert size["total_bytes"] == sum(path.stat().st_size for path in files)
    assert size["headroom_bytes"] == 16_000_000 - size["total_bytes"]
    assert (shipped.folder / f"artifacts/size_check/{SEED}/within_cap").read_text() == "yes\n"


def test_what_would_fit_fills_the_rest(experiment: Experiment) -> None:
    size = weigh(b"", _model_file(Params.model_validate(experiment.params)), cap_bytes=100_000)
    more = size["would_fit"]["weights"]
    filled = (size["weights"] + more) * size["bits_per_weight"] / 8
    assert 100_000 - size["bits_per_weight"] < filled <= 100_000


def test_over_the_cap_the_stage_fails_and_keeps_everything(shipped: Experiment) -> None:
    shipped.params["size_check"]["cap_bytes"] = 5000
    shipped.set_params(shipped.params)
    line = shipped.fails("size_check", SEED)
    assert "exceed size_check.cap_bytes = 5,000 by" in line
    assert "lower quantize.bits." in line
    assert (shipped.folder / f"artifacts/compress/{SEED}/model.bin").is_file()
    assert json.loads((shipped.folder / f"artifacts/size_check/{SEED}/size.json").read_text())["headroom_bytes"] < 0
    assert not (shipped.folder / f"artifacts/size_check/{SEED}/within_cap").exists()


def test_the_advice_names_the_class_with_most_bytes() -> None:
    classes = {"attn": {"bytes": 10}, "mlp": {"bytes": 70}, "embed": {"bytes": 20}}
    size = {"total_bytes": 105, "train_gpt_bytes": 1, "model_bytes": 104, "cap_bytes": 100, "headroom_bytes": -5}
    assert "lower quantize.bits.mlp (70 bytes)" in over_cap({**size, "classes": classes})


def test_missing_and_damaged_files_are_told_in_one_line(shipped: Experiment) -> None:
    model = shipped.folder / f"artifacts/compress/{SEED}/model.bin"
    model.write_bytes(model.read_bytes()[:-1])
    assert "model.bin: damaged model file: the checksum does not match" in shipped.fails("size_check", SEED)
    model.unlink()
    assert f"`python -m stages.compress {SEED}` makes it" in shipped.fails("size_check", SEED)
