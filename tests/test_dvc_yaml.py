"""dvc.yaml lists the code and the params that each stage reads: all that can change its result, and nothing else."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Experiment

from stages.compress.program.link import Linker
from stages.params import Params

STAGES: dict[str, Any] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
# Modules that cannot change a result: stages do not run again for them, nor for what they import in turn.
EXEMPT = {
    "stages": "how OpenMP's threads wait",
    "stages.ahead": "refuses, or leaves all as it was",
    "stages.command_line": "usage",
    "stages.errors": "messages",
    "stages.files": "files that appear whole or not at all",
    "stages.params": "the values it reads are listed one by one, as params",
    "stages.progress": "a bar on the terminal",
    "stages.sources": "which resume points are this code's",
    "stages.train.checkpoint": "a resumed run ends as an unbroken one",
    "stages.weights": "tensors are read as they were written",
}
# These take the program of the whole record apart: one packs it, one lists the packages that it imports.
PACKS_PROGRAM = ("compress", "submission")


@cache
def imported(entry: str) -> dict[str, ast.Module]:
    """The files that a module imports, with their text, but for exempt ones and those without a statement."""
    linker, found, wanted = Linker(REPOSITORY), list[str](), [entry]
    while new := linker.closure(wanted, [*EXEMPT, *found]):
        found += new
        wanted = list(linker.inner_imports(new))
    texts = {name: linker.module(name).statements for name in found}
    return {_file(name): ast.Module(text, []) for name, text in texts.items() if set(map(type, text)) - {ast.Expr}}


def _file(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}.py" if (REPOSITORY / f"{path}.py").is_file() else f"{path}/__init__.py"


def code(stage: str) -> set[str]:
    """The files that decide a stage's result."""
    program = imported("stages.__main__") if stage in PACKS_PROGRAM else {}
    return {*imported(f"stages.{stage}.__main__"), *program}


def deps(stage: str) -> list[str]:
    """The listed files and folders that are code."""
    return [path for path in STAGES[stage]["deps"] if path.split("/")[0] in ("model", "stages")]


def _covers(dep: str, file: str) -> bool:
    return Path(file).is_relative_to(dep)


def re_run_by(file: str) -> set[str]:
    """Stages that run again when a file changes."""
    return {stage for stage in STAGES if any(_covers(dep, file) for dep in deps(stage))}


@pytest.mark.parametrize("stage", STAGES)
def test_code_that_a_stage_imports_is_listed(stage: str) -> None:
    assert [file for file in sorted(code(stage)) if not any(_covers(dep, file) for dep in deps(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_code_that_is_listed_is_imported(stage: str) -> None:
    assert [dep for dep in deps(stage) if not any(_covers(dep, file) for file in code(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_sections_that_a_stage_reads_are_listed(stage: str) -> None:
    read = {
        node.attr
        for text in imported(f"stages.{stage}.__main__").values()
        for node in ast.walk(text)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"params|load_params\(.*\)", ast.unparse(node.value))
    }
    # DVC makes stages and commands of the seeds, the evaluators and the processes.
    read = (read & set(Params.model_fields)) - {"seeds", "evaluators", "processes"}
    assert read <= {name.split(".")[0] for name in STAGES[stage]["params"]}


def test_every_exemption_is_a_module_that_a_stage_imports() -> None:
    linker = Linker(REPOSITORY)
    assert set(EXEMPT) <= set(linker.closure([f"stages.{stage}.__main__" for stage in STAGES]))


def test_what_comes_late_re_runs_nothing_early() -> None:
    assert re_run_by("stages/evaluate/ttt.py") == {"compress", "evaluate", "certify", "submission"}
    assert re_run_by("stages/adapt/adapt.py") == {"adapt", "compress", "submission"}
    for packing in ("stages/compress/bundle.py", "stages/compress/program/sweep.py"):
        assert re_run_by(packing) == {"compress", "size_check", "submission"}


def test_the_commands_that_params_yaml_names_read_an_unwatched_file_again(experiment: Experiment) -> None:
    commands = re.findall(r"`dvc (repro --force --single-item \w+)`", (REPOSITORY / "params.yaml").read_text())
    assert [command.split()[-1] for command in commands] == ["fetch", "tokenize", "quantize"]
    experiment.run("dvc", "init", "--no-scm", "--quiet")
    experiment.run("dvc", "repro", "fetch")
    (experiment.folder / "corpus.jsonl").write_text(json.dumps({"text": "another"}))
    assert "Running" not in experiment.run("dvc", "repro", "fetch").stdout
    experiment.run("dvc", *commands[0].split())
    assert "another" in (experiment.folder / "data/docs/docs.jsonl").read_text()
    for command in commands[1:]:
        assert "Running stage" in experiment.run("dvc", *command.split(), "--dry").stdout
