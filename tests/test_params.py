"""params.yaml: strict, typed, cross-checked; faults are one line that names the file and the key."""

import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, tiny_params
from dvc.utils.serialize import parse_yaml

from fairway.evaluation.lora_ttt import LoraTttSettings
from fairway.evaluation.registry import evaluator_kinds
from fairway.params import Params, load_params
from fairway.quantization.gptq import GptqSettings
from fairway.reporting.comparison import PublishedSeed
from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section, parse_section
from fairway.training.schedule import ScheduleSettings

SLIDING = {"stride": 8, "batch_windows": 2, "published_window_list": False, "within_documents": False}
LORA = yaml.safe_load((REPOSITORY / "records/r1958-lora-ttt.yaml").read_text())["lora_ttt"]


def _changed(path: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(tiny_params(Path("corpus.jsonl")))
    _set(params, path, value)
    return params


def _set(params: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        params = params[parent]
    params[key] = value


def _load(tmp_path: Path, params: dict[str, Any]) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return load_params(path)


def test_the_laptop_default_loads() -> None:
    assert load_params(REPOSITORY / "params.yaml").seeds == [1337]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", 1.0, "train.learning_rate: unknown key"),
        ("extra", {}, "extra: unknown key"),
        ("train.max_steps", "600", "train.max_steps: Input should be a valid integer (found '600')"),
        ("train.compile", 1, "train.compile: Input should be a valid boolean"),
        ("model.heads", 3, "model: heads (3) must divide width (32)"),
        ("sliding.stride", 128, "sliding.stride (128) exceeds model.seq_len (64)"),
        ("ttt.freeze_blocks", 3, "ttt.freeze_blocks (3) exceeds model.layers (2)"),
        ("adapt.freeze_blocks", 3, "adapt.freeze_blocks (3) exceeds model.layers (2)"),
        ("tokenize.vocab_size", 512, "model.vocab_size (320) must equal tokenize.vocab_size (512)"),
        ("train.micro_batch_tokens", 300, "train: micro_batch_tokens (300) must divide batch_tokens (512)"),
        ("average.ema_decay", 0.5, "average.ema_decay (0.5) must be one of train.ema_decays [0.95]"),
        ("processes", 3, "processes (3) must divide the 2 micro-batches"),
        ("quantize.bits.mlp", 9, "quantize.bits.mlp: Input should be less than or equal to 8 (found 9)"),
        ("evaluators", ["sliding", "sliding"], "repeats a name"),
        ("evaluators", ["beam"], "evaluators.0: beam: no such evaluator; expected one of lora_ttt, sliding, slot,"),
        ("evaluators", ["sliding", "slot-8"], "evaluators.1: slot-8: no such evaluator; expected one of"),
        ("evaluators", ["sliding", "sliding_8"], "sliding_8: missing section, which the evaluator of that name needs"),
        ("slide_8", {}, "slide_8: unknown key; expected model, train, average, adapt, quantize, compress,"),
        ("slide_8", {}, "submission, or an evaluator: one of lora_ttt, sliding, slot, streaming, ttt, or one of these"),
        ("sliding_8", {"stride": 8, "batch_windows": 2}, "sliding_8.published_window_list: missing key"),
        (
            "sliding_8",
            SLIDING | {"published_window_list": True, "within_documents": True},
            "sliding_8.published_window_list: expected false with within_documents (found true)",
        ),
        ("sliding_8", SLIDING | {"stride": 128}, "sliding_8.stride (128) exceeds model.seq_len (64)"),
        ("sliding_8", SLIDING | {"strides": 8}, "sliding_8.strides: unknown key (found 8)"),
        (
            "ttt.chunk_tokens",
            1032,
            "ttt.chunk_tokens (1032) must be a multiple of model.seq_len (64) and of ttt.stride",
        ),
        ("fetch.path", 3, "fetch.path: expected a path or a list of paths (found 3)"),
        ("fetch.path", [], "fetch.path: expected a path or a list of paths (found [])"),
        ("fetch.path", ["x.jsonl", "artifacts/a.txt"], "fetch.path: artifacts/a.txt lies in artifacts, which is"),
        ("fetch.path", ".", "fetch.path: . holds data/docs, which is the pipeline's own: name a folder in it"),
        ("fetch.source", "files", "fetch.source: expected one of 'sdists', 'file', 'hub' (found 'files')"),
        ("train.loader.kind", "random", "train.loader.kind: expected one of 'sequential', 'coprime', 'packed',"),
        ("size_check.cap_bytes", 16_000_001, "size_check.cap_bytes: Input should be less than or equal to 16000000"),
        ("fetch.column", "", "fetch.column: String should have at least 1 character"),
        ("fetch.shuffle_seed", 1.5, "fetch.shuffle_seed: Input should be a valid integer"),
        ("train.loader.bucket", 64, "train.loader.bucket: unknown key (found 64)"),
        ("fetch.path", "data/docs/docs.jsonl", "fetch.path: data/docs/docs.jsonl lies in data/docs, which is"),
        ("fetch.path", "data/../artifacts/docs.jsonl", "docs.jsonl lies in artifacts, which is the pipeline's own"),
        ("fetch.path", str(Path("artifacts/x.jsonl").resolve()), "x.jsonl lies in artifacts, which is the pipeline's"),
        ("seeds", [-1], "seeds.0: Input should be greater than or equal to 0 (found -1)"),
        ("seeds", [1, 2**70], "seeds.1: Input should be less than 9223372036854775808"),
        ("train.max_wallclock_s", float("inf"), "train.max_wallclock_s: Input should be a finite number (found inf)"),
        ("adapt.lr", float("nan"), "adapt.lr: Input should be a finite number (found nan)"),
        ("train.warmup_steps", 20, "train: warmup_steps (20) are run to compile: expected 0 with compile: false"),
        ("compress.evaluator", "streaming", "compress.evaluator (streaming) must be one of evaluators ['sliding',"),
        ("evaluators", ["sliding", "streaming"], "streaming: missing section, which the evaluator of that name needs"),
        ("lora_ttt", LORA | {"chunk_tokens": 65}, "lora_ttt.chunk_tokens (65) exceeds model.seq_len (64)"),
        ("lora_ttt", LORA | {"lanes": 3}, "a multiple of lora_ttt.lanes * model.seq_len (192)"),
        ("lora_ttt", LORA | {"seed": -1}, "lora_ttt.seed: Input should be greater than or equal to 0 (found -1)"),
        ("lora_ttt", LORA | {"seed": 2**32}, "lora_ttt.seed: Input should be less than 4294967296"),
    ],
)
def test_a_fault_is_one_line_naming_file_and_key(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        _load(tmp_path, _changed(key, value))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "params.yaml"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"streaming": {"block_tokens": 8, "lanes": 1, "within_documents": False}},
            "streaming.lanes (1) is less than the 2 processes",
        ),
        ({"adapt.epochs": 1}, "adapt.lanes (1) is less than the 2 processes"),
        ({"adapt.epochs": 1, "adapt.lanes": 2}, None),
        ({}, None),
    ],
)
def test_lanes_are_enough_for_the_processes(tmp_path: Path, changes: dict[str, Any], expected: str | None) -> None:
    params = _changed("processes", 2)
    for path, value in changes.items():
        _set(params, path, value)
    with pytest.raises(UserError, match=re.escape(expected)) if expected else nullcontext():
        _load(tmp_path, params)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"compress.codec": "trellis_ans"},
            "quantize.grid (scalar) and compress.codec (trellis_ans): expected trellis",
        ),
        ({"quantize.grid": "trellis"}, "grid: trellis needs method: gptq, expected grid: scalar"),
    ],
)
def test_a_trellis_needs_gptq_and_its_codec(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    params = _changed("processes", 1)
    for path, value in changes.items():
        _set(params, path, value)
    with pytest.raises(UserError, match=re.escape(expected)):
        _load(tmp_path, params)


def test_the_largest_seeds_fit_the_generators() -> None:
    """Of the adapters, whose chunks, lanes and batches have each at most three digits."""
    torch.Generator().manual_seed(2**63 - 1)
    torch.Generator().manual_seed((((2**32 - 1) * 1000 + 999) * 1000 + 999) * 1000 + 999)


def test_no_setting_has_a_default() -> None:
    """Everything that can be set is read from a file. The header of model.bin is a file format, and no settings."""
    assert len(evaluator_kinds()) >= 5, "which imports the settings of every evaluator"
    settings = [kind for kind in _derived(Section) if kind.__module__ != "fairway.codec.container"]
    assert {Params, PublishedSeed, LoraTttSettings, GptqSettings, ScheduleSettings} <= set(settings)
    defaults = {
        f"{kind.__name__}.{key}" for kind in settings for key, f in kind.model_fields.items() if not f.is_required()
    }
    assert defaults == set()


def _derived(kind: type[Section]) -> list[type[Section]]:
    return [kind] + [found for derived in kind.__subclasses__() for found in _derived(derived)]


@pytest.mark.parametrize("file", ["params.yaml", "records/r1172.yaml", "records/r1958-lora-ttt.yaml"])
def test_every_missing_key_is_named_in_one_line(file: str, tmp_path: Path) -> None:
    """Whole sections of evaluators aside, which a file need not have."""
    params = yaml.safe_load((REPOSITORY / file).read_text())
    paths = [path for path in _paths(params) if "." in path or path in Params.model_fields]
    assert len(paths) > 120
    for path in paths:
        faulty = copy.deepcopy(params)
        *parents, key = path.split(".")
        del reduce(dict.__getitem__, parents, faulty)[key]
        with pytest.raises(UserError) as caught:
            parse_section(faulty, Params, tmp_path / "params.yaml")
        assert str(caught.value) == f"{tmp_path / 'params.yaml'}: {path}: missing key"


def _paths(section: dict[str, Any]) -> Iterator[str]:
    """Every key of nested sections, with those that it lies in."""
    for key, value in section.items():
        yield key
        yield from (f"{key}.{inner}" for inner in _paths(value)) if isinstance(value, dict) else ()


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: no such file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("seeds: [1\n")
    with pytest.raises(UserError, match=r"params\.yaml: not valid YAML: line 2: "):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_floats_read_as_dvc_reads_them(tmp_path: Path, text: str) -> None:
    """PyYAML alone takes 1e-3 for text (YAML 1.1); DVC takes it for a number (YAML 1.2)."""
    raw = yaml.safe_dump(_changed("slot.lr", 0.25)).replace("lr: 0.25", f"lr: {text}")
    (tmp_path / "params.yaml").write_text(raw)
    assert load_params(tmp_path / "params.yaml").evaluator_settings("slot").model_dump()["lr"] == 0.001


@pytest.mark.parametrize("text", ["010", "0o12", "1_0", "1:30", "yes", "on", "1e1", "!!int 10", "~"])
def test_every_scalar_is_read_as_dvc_reads_it_or_refused(tmp_path: Path, text: str) -> None:
    """PyYAML alone reads 010 as 8, 1:30 as 90 and yes as true (YAML 1.1)."""
    raw = yaml.safe_dump(_changed("train.max_steps", 777)).replace("max_steps: 777", f"max_steps: {text}")
    path = tmp_path / "params.yaml"
    path.write_text(raw)
    of_dvc = parse_yaml(raw, path)["train"]["max_steps"]
    if type(of_dvc) is int:
        assert load_params(path).train.max_steps == of_dvc
    else:
        with pytest.raises(UserError, match=r"params\.yaml: train\.max_steps: "):
            load_params(path)


def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"processes": 1}) + "processes: 2\n")
    with pytest.raises(UserError, match=r'params\.yaml: not valid YAML: line 2: found duplicate key "processes"'):
        load_params(tmp_path / "params.yaml")


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    assert isinstance(_load(tmp_path, _changed("train.max_steps", 7)).train.max_steps, int)


def test_a_misspelt_key_is_named_before_the_one_that_is_missing(tmp_path: Path) -> None:
    params = _changed("train.max_step", 300)
    del params["train"]["max_steps"]
    with pytest.raises(UserError, match=re.escape("train.max_step: unknown key (found 300); and 1 more")):
        _load(tmp_path, params)
