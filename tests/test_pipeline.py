"""The whole pipeline under DVC: what runs, what does not run again, and what a change re-runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, Experiment, git
from warm_python import warm_python

SEED = "1337"


def _ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="module")
def repro(tmp_path_factory: pytest.TempPathFactory, reproduced: Experiment) -> Experiment:
    """The project that was run once, to go on from."""
    return Experiment(shutil.copytree(reproduced.folder, tmp_path_factory.mktemp("repro"), dirs_exist_ok=True))


def _changed(folder: Path) -> set[str]:
    """The files that differ from the last commit, and new ones."""
    command = ["git", "status", "--porcelain"]
    lines = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line[3:] for line in lines}


def test_a_second_run_runs_nothing(repro: Experiment) -> None:
    again, status = repro.dvc("dvc repro", "dvc status")
    assert _ran(again) == set()
    assert "up to date" in status


def test_a_run_leaves_only_what_git_tracks_or_ignores_by_name(repro: Experiment) -> None:
    """The files added by the first run: those of results/ that hold scores and bytes, and DVC's own."""
    shown = ["git", "show", "--name-only", "--format=", "HEAD"]
    added = subprocess.run(shown, cwd=repro.folder, check=True, capture_output=True, text=True).stdout.split()
    tracked = {"summary.json", "report.md", "curve.csv", "positions.csv", "sizes.csv"}
    assert set(added) == {".dvc/.gitignore", "dvc.lock", *(f"results/{name}" for name in tracked)}
    assert (repro.folder / "results/report.html").exists()
    assert set(json.loads((repro.folder / "results/times.json").read_text())) == {"train_s", "eval_s", "ledger"}


def test_the_summary_is_small_and_complete(repro: Experiment) -> None:
    summary = json.loads((repro.folder / "results/summary.json").read_text())
    assert len(summary) <= 12
    assert {"sliding_bpb", "ttt_bpb", "slot_bpb_illegal", "xz_bpb", "artifact_bytes"} <= set(summary)


def test_the_shipped_program_alone_gives_the_same_score(repro: Experiment, tmp_path: Path) -> None:
    """No repository on its path: an isolated interpreter in a folder that holds four files."""
    shipped = repro.folder / "artifacts/compress" / SEED
    tokens = repro.folder / "artifacts/tokens"
    files = [shipped / "model.bin", shipped / "train_gpt.py", tokens / "tokenizer.model", tokens / "val_000000.bin"]
    for file in files:
        shutil.copy(file, tmp_path)
    command = [warm_python(), "-P", "train_gpt.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = float(re.search(r"_exact .* val_bpb:(\S+)", done.stdout)[1])  # type: ignore[index]
    metrics = json.loads((repro.folder / "artifacts/evaluate" / SEED / "sliding/metrics.json").read_text())
    assert found == pytest.approx(metrics["val_bpb"], abs=1e-6)


def test_certificates_tell_code_lengths_from_what_is_none(repro: Experiment) -> None:
    for name, legal in (("sliding", True), ("ttt", True), ("slot", False)):
        certificate = json.loads((repro.folder / "artifacts/certify" / SEED / name / "certificate.json").read_text())
        assert certificate["legal"] is legal
        assert all(condition["why"] and condition["evidence"] for condition in certificate["conditions"].values())


def test_slot_steps_re_run_only_the_slot_evaluation(repro: Experiment) -> None:
    done, figures = repro.dvc("dvc exp run -S slot.steps=3", "dvc metrics diff --json")
    assert _ran(done) == {f"evaluate@{SEED}-slot", f"certify@{SEED}-slot", "report", "submission"}
    changed = set(json.loads(figures)["results/summary.json"])
    assert "slot_bpb_illegal" in changed
    assert not {"sliding_bpb", "ttt_bpb", "artifact_bytes"} & changed
    # What docs/faq.md says of the files that a run changes, and how it undoes that.
    changed = _changed(repro.folder) - {"params.yaml"}
    assert "dvc.lock" in changed
    assert all(re.fullmatch(r"dvc\.lock|results/.*", file) for file in changed)
    [undo] = re.findall(r"`git (checkout HEAD .+?)`", (REPOSITORY / "docs/faq.md").read_text())
    git(repro.folder, *undo.split())
    assert _changed(repro.folder) == {"params.yaml"}


@pytest.mark.long
def test_bits_re_run_quantize_and_below_but_never_train(repro: Experiment) -> None:
    ran = _ran(repro.run("dvc", "exp", "run", "-S", "quantize.bits.mlp=5").stdout)
    assert {f"quantize@{SEED}", f"compress@{SEED}", f"evaluate@{SEED}-sliding", "report"} <= ran
    assert not {stage for stage in ran if stage.startswith(("fetch", "tokenize", "train", "average", "adapt"))}
    assert "sliding_bpb" in repro.run("dvc", "metrics", "diff").stdout


def test_an_unknown_key_stops_the_pipeline_in_one_line(repro: Experiment) -> None:
    with (repro.folder / "params.yaml").open("a") as file:
        file.write("surprise: 1\n")
    for stage in ("train", "quantize", "evaluate"):
        arguments = [SEED, "sliding"] if stage == "evaluate" else [SEED]
        line = repro.fails(stage, *arguments)
        assert line.startswith("error: params.yaml: surprise: unknown key; expected model, train, average,")
        assert "or an evaluator: one of " in line
