"""dvc.yaml lists the code and the params that each stage reads: all that can change its result, and nothing else."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Experiment
from import_graph import MODULES, closure, package, tree

from fairway.params import Params

STAGES: dict[str, Any] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
# Modules that cannot change a result, so that no stage runs again for them, nor for what they alone import.
EXEMPT = {
    "fairway": "how OpenMP's threads wait",
    "fairway.params": "its values are listed one by one, as params",
    "fairway.preflight": "refuses to start, or changes nothing",
    "fairway.packing.shipped_run": "refuses what ships, or changes nothing",
    "fairway.runtime": "files, processes, messages and progress; the track's limits, which are not ours to change",
}

# What git tracks of results/: scores and bytes.
RESULTS = ("summary.json", "report.md", "curve.csv", "positions.csv", "sizes.csv")


def imported(stage: str) -> set[str]:
    """The modules whose code decides a stage's result."""
    exempt = frozenset(name for name in MODULES if name in EXEMPT or f"fairway.{package(name)}" in EXEMPT)
    return closure(f"stages.{stage}", not_through=exempt)


def folder(module: str) -> str:
    """How dvc.yaml lists a module: its package in fairway, or the file itself."""
    return f"fairway/{package(module)}" if package(module) else str(MODULES[module].relative_to(REPOSITORY))


def deps(stage: str) -> list[str]:
    """The listed files and folders that are code."""
    return [path for path in STAGES[stage]["deps"] if path.split("/")[0] in ("fairway", "stages")]


def _covers(dep: str, file: str) -> bool:
    return Path(file).is_relative_to(dep)


def re_run_by(file: str) -> set[str]:
    """Stages that run again when a file changes, but for pack, behind which nothing runs if its text stays the same."""
    return {stage for stage in STAGES if any(_covers(dep, file) for dep in deps(stage))} - {"pack"}


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"pack"}))
def test_the_code_listed_is_the_code_imported_by_folder(stage: str) -> None:
    assert sorted(deps(stage)) == sorted({folder(module) for module in imported(stage)})


def test_the_lists_of_code_are_short() -> None:
    assert sum(len(deps(stage)) for stage in STAGES) <= 48


def test_all_code_is_packed_again_when_it_changes() -> None:
    assert deps("pack") == ["stages/pack.py", "fairway"]


@pytest.mark.parametrize("stage", STAGES)
def test_sections_that_a_stage_reads_are_listed(stage: str) -> None:
    read = {
        node.attr
        for module in imported(stage)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"params|load_params\(.*\)", ast.unparse(node.value))
    }
    # DVC makes stages and commands of the seeds, the evaluators and the processes.
    read = (read & set(Params.model_fields)) - {"seeds", "evaluators", "processes"}
    assert read <= {name.split(".")[0] for name in STAGES[stage]["params"]}


def test_every_exemption_is_a_module_that_a_stage_imports() -> None:
    reached = set().union(*(closure(f"stages.{stage}") for stage in STAGES))
    assert {
        name for name in EXEMPT if not any(module == name or module.startswith(f"{name}.") for module in reached)
    } == set()


def test_git_tracks_exactly_the_outs_that_dvc_does_not_keep(tmp_path: Path) -> None:
    """An out in both would make every clone dirty; one in neither would be lost."""
    shutil.copy(REPOSITORY / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    outs = [out for stage in STAGES.values() for out in [*stage.get("outs", []), *stage.get("metrics", [])]]
    of_git = {next(iter(out)) for out in outs if isinstance(out, dict)}
    of_dvc = {out for out in outs if isinstance(out, str)}
    assert of_git == {f"results/{name}" for name in RESULTS}
    assert all(out == {next(iter(out)): {"cache": False}} for out in outs if isinstance(out, dict))
    done = subprocess.run(
        ["git", "check-ignore", *of_git, *of_dvc], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == of_dvc


def test_what_comes_late_re_runs_nothing_early() -> None:
    assert re_run_by("fairway/evaluation/ttt.py") == {"evaluate", "certify"}
    assert re_run_by("fairway/packing/bundle.py") == {"compress"}
    for shown in ("fairway/reporting/page.py", "stages/doctor.py", "fairway/runtime/progress.py"):
        assert re_run_by(shown) <= {"report", "submission"}


@pytest.mark.parametrize(
    "file",
    [
        "stages/doctor.py",
        "fairway/preflight.py",
        "fairway/machine.py",
        "fairway/runtime/progress.py",
        "fairway/runtime/errors.py",
    ],
)
def test_what_only_displays_or_looks_ahead_re_runs_nothing(file: str) -> None:
    assert (REPOSITORY / file).is_file()
    assert re_run_by(file) == set()


def test_a_change_of_the_report_re_runs_what_is_written_for_people_alone() -> None:
    files = [path for path in (REPOSITORY / "fairway/reporting").rglob("*") if path.suffix in (".py", ".html", ".css")]
    assert len(files) >= 10
    for file in files:
        assert re_run_by(str(file.relative_to(REPOSITORY))) == {"report", "submission"}
    assert re_run_by("stages/report.py") == {"report"}
    assert re_run_by("stages/submission.py") == {"submission"}


def test_a_stage_re_runs_for_its_own_file_alone() -> None:
    assert {stage: re_run_by(f"stages/{stage}.py") for stage in STAGES} == {
        stage: {stage} - {"pack"} for stage in STAGES
    }


def test_the_graph_has_a_node_for_each_stage(experiment: Experiment) -> None:
    """As `make dag` prints it: a stage that runs for each seed or evaluator is one node."""
    [_, printed] = experiment.dvc("dvc init --no-scm -q", "dvc dag --mermaid --collapse-foreach-matrix")
    names = dict(re.findall(r'(node\d+)\["(\w+)"\]', printed))
    arrows = {(names[needed], names[stage]) for needed, stage in re.findall(r"(node\d+)-->(node\d+)", printed)}
    assert sorted(names.values()) == sorted(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"])
    assert {("fetch", "tokenize"), ("pack", "compress"), ("evaluate", "certify")} <= arrows


def test_the_commands_that_params_yaml_names_read_an_unwatched_file_again(experiment: Experiment) -> None:
    commands = re.findall(r"`dvc (repro --force --single-item \w+)`", (REPOSITORY / "params.yaml").read_text())
    assert [command.split()[-1] for command in commands] == ["fetch", "tokenize", "quantize"]
    experiment.dvc("dvc init --no-scm --quiet", "dvc repro fetch")
    (experiment.folder / "corpus.jsonl").write_text(json.dumps({"text": "another"}))
    unnoticed, *printed = experiment.dvc(
        "dvc repro fetch", f"dvc {commands[0]}", *(f"dvc {command} --dry" for command in commands[1:])
    )
    assert "Running" not in unnoticed
    assert "another" in (experiment.folder / "data/docs/docs.jsonl").read_text()
    assert all("Running stage" in text for text in printed)
