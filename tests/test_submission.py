"""The folder that is submitted: complete, made of the stages' output alone, honest, and its program runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Experiment
from reports import write_certificate
from warm_python import warm_python

from fairway.packing.bundle import outside_imports

SEED = "1337"
BASELINE_KEYS = {"author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code"}


def certify(experiment: Experiment, legal: bool | str, **conditions: tuple[str, str]) -> None:
    """Put a certificate of the evaluator that ships where stage certify puts it."""
    found = {name: {"verdict": verdict, "why": why, "evidence": {}} for name, (verdict, why) in conditions.items()}
    content = {"evaluator": "sliding", "legal": legal, "conditions": found, "certify_s": 1.0}
    write_certificate(experiment.folder, int(SEED), content)


def submitted(experiment: Experiment) -> tuple[dict[str, Any], str]:
    """submission.json and README.md, made anew."""
    experiment.stage("submission")
    folder = experiment.folder / "artifacts/submission"
    return json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, finished: Experiment) -> Experiment:
    """A tiny record up to its score, certified legal, and submitted."""
    made = Experiment(tmp_path_factory.mktemp("scored"))
    shutil.copytree(finished.folder / "artifacts", made.folder / "artifacts")
    made.stage("size_check", SEED)
    made.stage("evaluate", SEED, "sliding")
    certify(made, True, causal=("pass", "no score moved"))
    made.stage("submission")
    return made


def test_the_folder_has_the_challenges_form(scored: Experiment) -> None:
    files = {file.name for file in (scored.folder / "artifacts/submission").iterdir()}
    assert files == {
        *(
            "README.md",
            "submission.json",
            "train_gpt.py",
            "requirements.txt",
            "tokenizer.model",
            "tokens.json",
            "source",
        ),
        f"train_seed{SEED}.log",
    }


def test_the_source_beside_the_program_is_the_repositorys(scored: Experiment) -> None:
    """Files of which something is left in the program, and those that prepare tokens; of the others none."""
    source = scored.folder / "artifacts/submission/source"
    files = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    for name in files:
        assert (source / name).read_text() == (REPOSITORY / name).read_text()
    assert files >= {
        *("fairway/whole_record.py", "fairway/training/muon.py", "fairway/evaluation/sliding.py"),
        *(
            "fairway/tokens/caseops.py",
            "fairway/__init__.py",
            "fairway/model/kernels/__init__.py",
        ),
    }
    assert not {"fairway/evaluation/slot.py", "fairway/packing/link.py", "fairway/params.py"} & files
    settings = yaml.safe_load((source / "settings.yaml").read_text())
    assert settings == {name: scored.params[name] for name in settings}
    assert settings.keys() == {"model", "train", "average", "adapt", "quantize", "compress", "sliding"}


def test_the_readme_tells_method_sources_and_how_bytes_are_counted(scored: Experiment, tmp_path: Path) -> None:
    copy = Experiment(tmp_path)
    shutil.copytree(scored.folder / "artifacts", copy.folder / "artifacts")
    path = copy.folder / "artifacts/tokens/meta.json"
    meta = json.loads(path.read_text())
    found, text = submitted(copy)
    assert found["builds_on"] == ["PR #1150", "PR #549"]
    assert "Builds on [PR #1150](https://github.com/openai/parameter-golf/pull/1150), [PR #549](" in text
    assert f"width {copy.params['model']['width']}, 320 tokens, rows of 64." in text
    assert f"stand for {meta['val_bytes']:,} bytes; " in text
    assert f"They are all of its UTF-8 text: {meta['val_text_bytes']:,} bytes." in text
    path.write_text(json.dumps(meta | {"val_text_bytes": 123, "transform": "caseops", "fused_pairs": [[262, 5, 196]]}))
    text = submitted(copy)[1]
    assert "Its UTF-8 text has 123 bytes" in text
    assert "A sidecar holds of every validation token" in text
    assert "1 frequent pairs of tokens are one token each" in text
    path.write_text(json.dumps(meta | {"val_text_bytes": None}))
    assert "The shards are a published export" in submitted(copy)[1]


def test_submission_json_says_what_the_stages_found(scored: Experiment) -> None:
    found, text = submitted(scored)
    score = json.loads((scored.folder / f"artifacts/evaluate/{SEED}/sliding/metrics.json").read_text())
    size = json.loads((scored.folder / f"artifacts/size_check/{SEED}/size.json").read_text())
    assert set(found) >= BASELINE_KEYS
    assert (found["val_bpb"], found["val_loss"]) == (score["val_bpb"], score["val_loss"])
    assert found["bytes_total"] == size["total_bytes"]
    assert found["bytes_code"] == (scored.folder / "artifacts/submission/train_gpt.py").stat().st_size
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["track"] == "10min_16mb"
    assert found["subset"] is None
    assert found["certificate"]["verdict"] == "legal"
    assert "Certified legal" in text
    assert f"{score['val_bpb']:.8f}" in text
    assert "To be filled in before it is submitted: `submission.author` of params.yaml." in text


def test_a_score_of_a_part_of_the_validation_documents_is_labelled(scored: Experiment, tmp_path: Path) -> None:
    copy = Experiment(tmp_path)
    shutil.copytree(scored.folder / "artifacts", copy.folder / "artifacts")
    meta = copy.folder / "artifacts/tokens/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"held_out_documents": 50}))
    found, text = submitted(copy)
    assert found["subset"] == "the first 4 of 50 validation documents"
    assert "**Scored on the first 4 of 50 validation documents alone.**" in text
    log = (copy.folder / f"artifacts/submission/train_seed{SEED}.log").read_text()
    assert "\nscored on the first 4 of 50 validation documents\nfinal_sliding_exact " in log


@pytest.mark.parametrize(("train_gpus", "eval_gpus"), [(0, 0), (1, 1), (8, 8), (8, 2), (2, 8)])
def test_limits_of_time_are_judged_on_eight_gpus_alone(
    train_gpus: int, eval_gpus: int, scored: Experiment, tmp_path: Path
) -> None:
    """Each by the processes that took the time: a score may be made again with others than trained."""
    copy = Experiment(tmp_path)
    shutil.copytree(scored.folder / "artifacts", copy.folder / "artifacts")
    file = copy.folder / f"artifacts/train/{SEED}/train.json"
    train = json.loads(file.read_text())
    train["environment"] |= {"processes": train_gpus or 8, "cuda": "12.8" if train_gpus else None}
    file.write_text(json.dumps(train))
    file = copy.folder / f"artifacts/evaluate/{SEED}/sliding/metrics.json"
    made_on = {"processes": eval_gpus or 8, "on_gpus": bool(eval_gpus)}
    file.write_text(json.dumps(json.loads(file.read_text()) | made_on))
    found, text = submitted(copy)
    assert found["hardware"].endswith(f", scored on {eval_gpus}") == (train_gpus != eval_gpus)
    for rule, gpus in (("train_under_600s", train_gpus), ("eval_under_600s", eval_gpus)):
        kept = True if gpus == 8 else None
        assert found["compliance"][rule] is kept
        assert (f"Told only by a run on 8 GPUs: `{rule}`." in text) == (kept is None)
        assert f"Not kept: `{rule}`" not in text


@pytest.mark.parametrize(("legal", "label"), [(False, "NOT LEGAL"), ("unproven", "UNPROVEN")])
def test_what_is_not_proven_legal_is_labelled(scored: Experiment, tmp_path: Path, legal: Any, label: str) -> None:
    copy = Experiment(tmp_path)
    shutil.copytree(scored.folder / "artifacts", copy.folder / "artifacts")
    verdict = "unproven" if legal == "unproven" else "fail"
    certify(copy, legal, causal=("pass", "no score moved"), normalised=(verdict, "sums to 1.02"))
    found, text = submitted(copy)
    assert (found["certificate"]["verdict"], found["compliance"]["certified_legal"]) == (
        "unproven" if legal == "unproven" else "illegal",
        False,
    )
    assert label in text.splitlines()[4]
    assert f"* `normalised` {verdict} (seed {SEED}): sums to 1.02" in text
    assert "`causal`" not in text


def test_the_log_has_the_lines_that_people_look_for(scored: Experiment) -> None:
    log = (scored.folder / f"artifacts/submission/train_seed{SEED}.log").read_text()
    train = json.loads((scored.folder / f"artifacts/train/{SEED}/train.json").read_text())
    steps = re.findall(r"^step:(\d+)/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$", log, flags=re.M)
    assert [int(step) for step in steps] == [*range(1, 11), 12]
    validated = re.findall(r"^step:(\d+)/12 val_loss:\d+\.\d{4} val_bpb:(\d+\.\d{4})", log, flags=re.M)
    assert [int(step) for step, _ in validated] == [0, 6, 12]
    assert float(validated[-1][1]) == pytest.approx(train["val_bpb"], abs=1e-4)
    size = json.loads((scored.folder / f"artifacts/size_check/{SEED}/size.json").read_text())
    assert f"\nCode size: {size['train_gpt_bytes']} bytes\n" in log
    assert f"\nTotal submission size: {size['total_bytes']} bytes\n" in log
    assert re.search(r"^final_sliding_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8} eval_time:\d+ms$", log, flags=re.M)


def test_its_program_alone_gives_the_submitted_score(scored: Experiment, tmp_path: Path) -> None:
    """An empty folder with the program and tokenizer of the submission, the model and the validation shard."""
    submission, artifacts = scored.folder / "artifacts/submission", scored.folder / "artifacts"
    for file in (submission / "train_gpt.py", submission / "tokenizer.model"):
        shutil.copy(file, tmp_path)
    shutil.copy(artifacts / f"compress/{SEED}/model.bin", tmp_path)
    shutil.copy(artifacts / "tokens/val_000000.bin", tmp_path)
    done = subprocess.run(
        [warm_python(), "-P", "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = float(re.search(r"^final_sliding_exact .* val_bpb:(\S+)", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert found == pytest.approx(json.loads((submission / "submission.json").read_text())["val_bpb"], abs=1e-6)


def test_requirements_are_what_the_shipped_program_imports(scored: Experiment) -> None:
    submission = scored.folder / "artifacts/submission"
    outside = outside_imports((scored.folder / "artifacts/pack/program.py").read_text())
    assert {"torch", "numpy", "pydantic", "sentencepiece"} <= outside
    assert not {"dvc", "dvclive", "matplotlib", "pytest", "stages", "fairway", "json"} & outside
    lines = (submission / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} >= {"torch", "numpy", "pydantic", "sentencepiece"}
    pinned = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith(("triton", "flash"))} <= set(pinned)


def test_the_stub_that_unpacks_the_program_has_requirements_too() -> None:
    assert outside_imports("import json, numpy.linalg\nfrom torch.nn import Module as m\n") == {
        "numpy",
        "torch",
        "pyppmd",
    }


def test_a_missing_certificate_names_the_stage_that_makes_it(scored: Experiment, tmp_path: Path) -> None:
    copy = Experiment(tmp_path)
    shutil.copytree(scored.folder / "artifacts", copy.folder / "artifacts")
    shutil.rmtree(copy.folder / "artifacts/certify")
    assert copy.fails("submission").endswith(f"`python -m stages.certify {SEED} sliding` makes it")
