"""Every file in records/: it loads, builds the published network, plans the right stages, and trains at toy size."""

import json
import re
import shutil
import subprocess
import sys
from difflib import ndiff
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, Experiment, tiny_params
from dvc.utils.hydra import apply_overrides

from fairway.evaluation.slot_offsets import SlotSettings
from fairway.model.gpt import GPT
from fairway.params import Params, load_params

PARAMETERS = {
    "fairway": 35_945_671,
    "lab": 35_945_671,
    "r1150": 26_993_756,
    "r1172": 27_201_116,
    "r1488": 26_862_694,
    "r1958": 35_945_671,
}
TOY_STEPS = 6

FILES = sorted(path.stem for path in (REPOSITORY / "records").glob("*.yaml") if path.stem != "published")
VARIANTS = [name for name in FILES if name.partition("-")[0] in FILES and name not in PARAMETERS]
# Every file in one process: `dvc repro --dry --force`, as the README has it, behind a line that names the file. Without
# --force DVC 3.67 stops at the first stage whose input is not made yet.
DRY_RUNS = """
import shutil, sys
from dvc.cli import main
assert main(["init", "-q"]) == 0
for name in sys.argv[1:]:
    shutil.copy(f"records/{name}.yaml", "params.yaml")
    print("params", name, flush=True)
    assert main(["repro", "--dry", "--force"]) == 0
"""


def toy(record: str, corpus: Path) -> dict[str, Any]:
    """The record with the sizes of the tiny experiment and every mechanism of its own.

    Only r1958's lrzip gives way to a compressor that comes with Python: a machine need not have the program to train.
    """
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "records" / f"{record}.yaml").read_text())
    tiny = tiny_params(corpus)
    params |= {"seeds": [1337], "processes": 1, "fetch": tiny["fetch"]}
    params["tokenize"] |= {"vocab_size": 600, "val_documents": 4, "shard_tokens": 2000}
    params["model"] |= {"vocab_size": 600, "width": 32, "heads": 4, "kv_heads": 2, "mlp_hidden": 64, "seq_len": 64}
    params["model"]["rope"]["dims"] = 4
    if params["model"]["bigram"]:
        params["model"]["bigram"] |= {"buckets": 64, "width": 8}
        params["model"]["value_embedding"]["width"] = 8
    params["train"] |= {"max_steps": TOY_STEPS, "max_wallclock_s": None, "batch_tokens": 512, "micro_batch_tokens": 128}
    params["train"] |= {"warmup_steps": 0, "compile": False, "val_every": 20, "log_every": 1}
    params["ttt"]["chunk_tokens"] = 128
    if params["compress"]["codec"] == "lrzip":
        params["compress"]["codec"] = "lzma"
    for evaluator in ("sliding", "ttt", "slot"):
        params[evaluator]["stride"] = 32
    return params


def load(name: str) -> Params:
    """A file of records/."""
    return load_params(REPOSITORY / "records" / f"{name}.yaml")


@pytest.mark.parametrize("name", FILES)
def test_a_record_builds_the_published_network(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(load(name).model).parameters())
    assert count == PARAMETERS[name.partition("-")[0]]


@pytest.mark.parametrize("name", FILES)
def test_a_record_is_a_complete_file_with_a_word_on_every_section(name: str) -> None:
    text = (REPOSITORY / "records" / f"{name}.yaml").read_text()
    assert text.startswith(f"# {name}: ")
    assert f"cp records/{name}.yaml params.yaml && dvc repro" in text
    sections = set(yaml.safe_load((REPOSITORY / "params.yaml").read_text()))
    assert sections <= set(yaml.safe_load(text))
    assert len(re.findall(r"^ *# ", text, flags=re.MULTILINE)) > 90


@pytest.mark.parametrize("file", ["params.yaml", *(f"records/{name}.yaml" for name in FILES)])
def test_an_experiment_changes_one_line_of_the_file(file: str, tmp_path: Path) -> None:
    """By the function with which `dvc exp run -S slot.steps=7` writes params.yaml."""
    before, written = (REPOSITORY / file).read_text(), tmp_path / "params.yaml"
    written.write_text(before)
    apply_overrides(written, ["slot.steps=7"])
    changed = [line for line in ndiff(before.splitlines(), written.read_text().splitlines()) if line[0] in "-+"]
    assert len(changed) == 2, changed
    assert changed[0].startswith("-   steps: ")
    assert changed[1] == "+   steps: 7"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_says_where_it_differs_from_the_record(name: str) -> None:
    """Of sections whose settings differ, each is named in the head of the file."""
    text = (REPOSITORY / "records" / f"{name}.yaml").read_text()
    head = text.partition("\n\n")[0]
    own, record = (load(key).model_dump() for key in (name, name.partition("-")[0]))
    differing = {section for section in {*own, *record} if own.get(section) != record.get(section)} - {"submission"}
    unnamed = {section for section in differing if not re.search(rf"\b{section}\b", head)}
    assert {section for section in unnamed if not _only_the_window_list(own.get(section), record.get(section))} == set()


def _only_the_window_list(own: Any, record: Any) -> bool:
    return (
        isinstance(own, dict)
        and isinstance(record, dict)
        and {key for key in own if own[key] != record[key]} == {"published_window_list"}
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_looks_at_no_token_before_it_is_scored(name: str) -> None:
    """What the four conditions ask of the settings; the stage certify measures it."""
    params = load(name)
    assert params.adapt.split == "train"
    assert params.quantize.gptq is None or params.quantize.gptq.calibration == "train"
    for evaluator in params.evaluators:
        settings = params.evaluator_settings(evaluator)
        fits = [settings if isinstance(settings, SlotSettings) else getattr(settings, "slot", None)]
        assert all(fit is None or fit.fitted_on == "context" for fit in fits)
        assert not getattr(settings, "published_window_list", False)


def with_a_second_sliding(text: str) -> str:
    """A params file in which one evaluator occurs twice, under two names."""
    params = yaml.safe_load(text)
    params["sliding_512"] = params["sliding"] | {"stride": 512}
    return yaml.safe_dump(params | {"evaluators": [*params["evaluators"], "sliding_512"]})


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By file of records/, and for "twice", r1172 with a second sliding evaluation: the stages that a dry run lists, in
    their order."""
    folder = tmp_path_factory.mktemp("plans")
    for name in ("records", "stages", "fairway"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    twice = with_a_second_sliding((folder / "records/r1172.yaml").read_text())
    (folder / "records/twice.yaml").write_text(twice)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, *FILES, "twice"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.split(r"^params (.+)$", done.stdout, flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"Running stage '([^']+)'", listed)
        for name, listed in zip(found[::2], found[1::2], strict=True)
    }


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_lists_the_stages_of_every_seed_and_evaluator(name: str, plans: dict[str, list[str]]) -> None:
    params = load(name)
    per_seed = ("train", "average", "adapt", "quantize", "compress", "size_check")
    expected = {"fetch", "tokenize", "pack", "report"} | {
        f"{stage}@{seed}" for stage in per_seed for seed in params.seeds
    }
    expected |= {f"evaluate@{seed}-{evaluator}" for seed in params.seeds for evaluator in params.evaluators}
    # Further stages (certificates, submission) are judged by their own tests.
    assert expected <= set(plans[name])
    others = {stage for stage in plans[name] if stage.startswith(("train@", "evaluate@"))}
    assert others <= expected
    order = plans[name]
    assert order.index("fetch") < order.index("tokenize") < order.index(f"train@{params.seeds[0]}")


def test_a_second_use_of_an_evaluator_is_a_stage_of_its_own(plans: dict[str, list[str]]) -> None:
    seeds = load("r1172").seeds
    more = {f"{stage}@{seed}-sliding_512" for stage in ("evaluate", "certify") for seed in seeds}
    assert set(plans["twice"]) == set(plans["r1172"]) | more


# r1488 and r1958 have every mechanism between them.
@pytest.mark.parametrize(
    "record",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("r1150", "r1172", "r1488")),
        "r1958",
    ],
)
def test_a_record_trains_alike_on_one_process_and_on_two(record: str, experiment: Experiment) -> None:
    experiment.copy_code()
    experiment.set_params(toy(record, experiment.folder / "corpus.jsonl"))
    experiment.stage("fetch")
    experiment.stage("tokenize")
    losses = []
    for processes in (1, 2):
        if processes == 1:
            experiment.stage("train", "1337")
        else:
            launch = (
                "-m",
                "fairway.runtime.launch",
                "--standalone",
                f"--nproc-per-node={processes}",
                "-m",
                "stages.train",
            )
            experiment.run("python", *launch, "1337")
        trained = experiment.folder / "artifacts/train/1337"
        assert json.loads((trained / "train.json").read_text())["steps"] == TOY_STEPS
        rows = (trained / "live/plots/metrics/train_loss.tsv").read_text().splitlines()[1:]
        losses.append([float(row.split("\t")[1]) for row in rows])
    assert len(losses[0]) == TOY_STEPS
    # Relative: the records exchange gradients in bfloat16, whose sums round differently by the number of processes.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fairway", *VARIANTS])
def test_a_variant_or_our_own_record_runs_from_documents_to_its_scores(name: str, experiment: Experiment) -> None:
    """At toy size, evaluated by two processes."""
    params = toy(name, experiment.folder / "corpus.jsonl")
    if params["adapt"]["epochs"]:
        params["adapt"] |= {"epochs": 2, "max_rows": 40, "batch_rows": 2}
    if params["quantize"]["gptq"]:
        params["quantize"]["gptq"] |= {"batches": 2, "batch_rows": 4}
    if "lora_ttt" in params:
        params["lora_ttt"] |= {"chunk_tokens": 16, "batch_documents": 2, "rank": 4, "prefix_documents": 2, "phases": 1}
        params["lora_ttt"]["global_chunk_tokens"] = 8 * params["model"]["seq_len"]
    experiment.set_params(params)
    # What packs reads the code in the folder.
    experiment.copy_code()
    for stage in ("fetch", "tokenize", "pack"):
        experiment.stage(stage)
    for stage in ("train", "average", "adapt", "quantize", "compress", "size_check"):
        experiment.stage(stage, "1337")
    scores = {}
    for evaluator in params["evaluators"]:
        launch = ("-m", "fairway.runtime.launch", "--standalone", "--nproc-per-node=2", "-m", "stages.evaluate")
        experiment.run("python", *launch, "1337", evaluator)
        metrics = json.loads((experiment.folder / f"artifacts/evaluate/1337/{evaluator}/metrics.json").read_text())
        assert metrics["scored"] == metrics["targets"], "every token is scored once"
        scores[evaluator] = metrics["val_bpb"]
    assert max(scores.values()) < 1.2 * min(scores.values())
