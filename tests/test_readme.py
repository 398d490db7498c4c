"""The commands of the README and of the pages in docs/, and the worked example, run as they stand there.

A command that nobody runs fails a test.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Experiment
from dvc.utils.hydra import apply_overrides
from torch.distributed.run import get_args_parser
from warm_python import warm_environment

from fairway.params import load_params
from fairway.tokens.own_text import FetchFile

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
RECORDS_TABLE = PAGES["reproduce"].partition("| file in records/ |")[2].partition("\n\n")[0]
SEED = "1337"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in the README and then in the pages of docs/."""
    texts = [README, *PAGES.values()]
    return [
        block
        for text in texts
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Every line of the sh blocks, without its comment."""
    lines = (re.sub(r"\s+#.*", "", line) for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line]


# Run by the tests of the functions' names.
MAKE = {
    "make repro": "dvc repro",
    "make repro DATA=texts": "dvc repro",
    "make repro DATA=texts.parquet COLUMN=body": "dvc repro",
    "make record RECORD=r1172 GPUS=8": "dvc repro",
    "make record RECORD=lab-1gpu GPUS=1": "dvc repro",
    "make pack FILE=notes.md": "python -m fairway.zip pack 'notes.md'",
    "make sample PROMPT='The database'": "python -m fairway.sample 'The database'",
    "make compare": "python -m stages.compare",
    'make compare OF="workspace rapid-lark"': "python -m stages.compare workspace rapid-lark",
    "make test": "pytest -n 2 --dist loadfile --no-loadscope-reorder",
    "make doctor": "python -m stages.doctor",
    "make dag": "dvc dag --mermaid --collapse-foreach-matrix",
}
PLANNED = {
    "cp records/r1172.yaml params.yaml": "",
    "dvc repro --dry --force": r"evaluate@2025-slot",
}
# In the order of docs/experiments.md, after a first `dvc repro`, with what their output must match.
PIPELINE = {
    "dvc repro": "up to date",
    "dvc exp run -S slot.steps=24": rf"Running stage 'evaluate@{SEED}-slot'",
    "dvc exp run -S quantize.bits.mlp=5": rf"Running stage 'quantize@{SEED}'",
    "dvc metrics diff": "sliding_bpb",
    "dvc exp run --queue -S slot.steps=2,4,8 -S slot.lr=3.0e-3,1.0e-2": r"(?s)(Queued experiment.*){6}",
    "dvc queue start": "Started",
    "dvc queue status": "Running|Success|Queued",
    "dvc exp show --only-changed --drop '^(artifacts|model|stages)'": r"slot\.steps",
    "dvc remote add --default store ../store": "",
    "dvc push --run-cache": "pushed",
}
CLONED = {"dvc pull --run-cache": "fetched"}
MACHINES = (
    "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m stages.train 1337",
    "dvc commit --force train@1337",
)
ALONE = (
    "mkdir alone && cp artifacts/compress/1337/* artifacts/tokens/tokenizer.model artifacts/tokens/val_000000.bin "
    "alone",
    "cd alone && python train_gpt.py",
)
# In a folder with a model.bin and notes.md, with what their output must match.
ZIPPED = {
    "python -m fairway.zip pack notes.md": r"xz -9e .*bytes",
    "python -m fairway.zip unpack notes.md.fwz again.md": "wrote again.md",
    'python -m fairway.sample "The database" --temperature 0.8 --seed 1 --tokens 200': "^The database.",
}


def shell(folder: Path, command: str) -> str:
    """What a command line prints in a shell, whose python is the warm one; it must end well."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=warm_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commit(folder: Path) -> None:
    """Commit everything."""
    shell(folder, "git add -A && git -c user.name=t -c user.email=t@example.org commit -qm 'as it is'")


def test_every_command_is_run_by_a_test() -> None:
    claimed = [*MAKE, *PLANNED, *PIPELINE, *CLONED, *MACHINES, *ALONE, *ZIPPED]
    assert sorted(set(commands())) == sorted(claimed)


@pytest.mark.program("make")
@pytest.mark.parametrize("command", MAKE)
def test_a_target_of_make_does_what_it_says(command: str) -> None:
    """As planned: what it starts is run elsewhere."""
    planned = shell(REPOSITORY, command.replace("make", "make --dry-run --no-print-directory"))
    assert planned.splitlines()[-1].rstrip() == MAKE[command]


@pytest.mark.program("make")
@pytest.mark.parametrize(("target", "name"), [("repro", "DATA"), ("pack", "FILE"), ("sample", "PROMPT")])
def test_what_make_is_given_reaches_the_program_as_it_is(target: str, name: str) -> None:
    """Prompts and names of files hold apostrophes, and signs that make and the shell would read as theirs."""
    given = "It's $5, \"$HOME\" # 'no' `ls`"
    planned = shell(REPOSITORY, f"make --dry-run --no-print-directory {target} {shlex.quote(f'{name}={given}')}")
    assert shlex.split(next(line for line in planned.splitlines() if line.startswith("python -m ")))[-1] == given


@pytest.mark.program("make", "sed")
def test_help_names_every_target() -> None:
    told = shell(REPOSITORY, "make --no-print-directory help")
    [phony] = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"make ([a-z-]+)", told))


@pytest.mark.program("make", "grep")
def test_a_folder_without_git_is_told_what_it_needs(tmp_path: Path) -> None:
    """Before DVC, which only says that there is no repository, and not where the setting belongs."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/installed").touch()
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    command = ["make", "repro"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    told = "not a git repository: do `git init`, or `dvc config --local core.no_scm true` without git"
    assert done.stderr.startswith(f"error: {told}\n")
    assert "`git init`" in README
    assert "`dvc config --local core.no_scm true`" in README
    shell(tmp_path, "dvc config --local core.no_scm true")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "not a git repository" not in done.stderr


def own_text() -> str:
    """The section `fetch` for text of one's own."""
    [section] = [block for block in blocks("yaml") if block.startswith("fetch:\n")]
    return section


@pytest.mark.program("make")
def test_make_reads_text_of_ones_own_anew_each_time() -> None:
    planned = shell(REPOSITORY, "make --dry-run --no-print-directory repro DATA='my texts' COLUMN=body").splitlines()
    steps = ["python -m stages.use_data 'my texts' 'body'", "dvc repro --force --single-item fetch", "dvc repro"]
    assert planned[-3:] == steps


def test_the_five_lines_for_text_of_ones_own_are_what_is_written(experiment: Experiment) -> None:
    """By the command of the Makefile, into the file that ships, of which everything else stays."""
    ships = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    params = experiment.folder / "params.yaml"
    params.write_text(ships, encoding="utf-8")
    assert "texts: no such file or folder (fetch.path)" in experiment.fails("use_data", "texts")
    assert params.read_text(encoding="utf-8") == ships
    (experiment.folder / "texts").mkdir()
    (experiment.folder / "texts/one.txt").write_text("one")
    experiment.stage("use_data", "texts")
    before, _, rest = ships.partition("fetch:\n")
    after = rest[rest.index("\n\n") + 1 :]
    assert params.read_text(encoding="utf-8") == before + own_text() + after
    assert load_params(params).fetch == FetchFile.model_validate(yaml.safe_load(own_text())["fetch"])


def test_a_single_experiment_on_text_of_ones_own_needs_no_other_file(tmp_path: Path) -> None:
    """By the function with which `dvc exp run` changes params.yaml."""
    [line] = re.findall(r"`(dvc exp run -S '~fetch'[^`]*)`", PAGES["own-text"])
    params = shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    apply_overrides(params, [word for word in shlex.split(line)[3:] if word != "-S"])
    assert load_params(params).fetch == FetchFile.model_validate(yaml.safe_load(own_text())["fetch"])


def test_a_record_can_be_planned_on_any_machine(experiment: Experiment) -> None:
    experiment.copy_code()
    first, *of_dvc = PLANNED
    shell(experiment.folder, f"git init -q && {first}")
    _, *printed = experiment.dvc("dvc init -q", *of_dvc)
    for command, output in zip(of_dvc, printed, strict=True):
        assert re.search(PLANNED[command], output), command


def test_the_table_has_every_record_but_the_lab_which_has_a_section_of_its_own() -> None:
    named = {name for row in RECORDS_TABLE.splitlines()[2:] for name in row.split("|")[1].replace(",", " ").split()}
    assert named | {"lab-1gpu", "published"} == {path.stem for path in (REPOSITORY / "records").glob("*.yaml")}


def test_torchrun_knows_the_options_and_the_records_the_processes() -> None:
    arguments = get_args_parser().parse_args(shlex.split(MACHINES[0])[1:])
    assert (arguments.module, arguments.training_script) == (True, "stages.train")
    assert arguments.training_script_args == [SEED]
    train = load_params(REPOSITORY / "records/r1172.yaml").train
    micro_batches = train.batch_tokens // train.micro_batch_tokens
    assert micro_batches % (int(arguments.nnodes) * int(arguments.nproc_per_node)) == 0
    assert f"{micro_batches} in the records" in PAGES["reproduce"]


def test_files_and_folders_of_the_tree_exist() -> None:
    [tree] = re.findall(r"^```text\n(.*?)^```", PAGES["tree"], flags=re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^( *)(\S+) ", tree, flags=re.MULTILINE)
    assert len(entries) == len(tree.splitlines())
    parent = ""
    for indent, name in entries:
        parent = parent if indent else name
        assert (REPOSITORY / (parent + name if indent else name)).exists(), name


def example() -> tuple[str, str]:
    """The worked example: the evaluator's file, and its section of params.yaml."""
    [evaluator] = [block for block in blocks("python") if block.startswith("# fairway/evaluation/tempered.py\n")]
    [section] = [block for block in blocks("yaml") if block.startswith("# params.yaml; and `tempered`")]
    return evaluator, section


def test_the_worked_example_is_short() -> None:
    assert sum(len(block.splitlines()) for block in example()) <= 40


# What a certificate of the example asks for at each token.
STEPPER = """
import torch
from fairway.certification.stepping import make_stepper
from fairway.evaluation.registry import evaluator_class
from fairway.model.gpt import GPT
from fairway.params import load_params
from fairway.runtime.distributed import alone
params = load_params("params.yaml")
evaluator = evaluator_class("tempered")(params.evaluator_settings("tempered"))
stream = torch.zeros(1000, dtype=torch.int64)
evaluation = evaluator.begin(GPT(params.model), stream, alone(torch.device("cpu")))
print(type(make_stepper(evaluation, torch.ones(999, dtype=torch.bool))).__name__)
"""


def test_the_worked_example_scores(finished_copy: Experiment) -> None:
    """Added in three places and no fourth. A higher temperature costs bits, and 1 is sliding."""
    evaluator, section = example()
    finished_copy.copy_code()
    (finished_copy.folder / "fairway/evaluation/tempered.py").write_text(evaluator)
    added = yaml.safe_load(section)
    added["tempered"] |= {"stride": finished_copy.params["sliding"]["stride"], "temperature": 1.0}
    added["tempered_hot"] = added["tempered"] | {"temperature": 1.5}
    names = ["sliding", *added]
    finished_copy.set_params(finished_copy.params | added | {"evaluators": names})
    bpb = {name: _score(finished_copy.run("python", "-m", "stages.evaluate", SEED, name).stdout) for name in names}
    assert bpb["tempered"] == pytest.approx(bpb["sliding"], abs=1e-6)
    assert bpb["tempered"] < bpb["tempered_hot"]
    # Its certificate is as cheap as that of sliding.
    assert finished_copy.run("python", "-c", STEPPER).stdout == "WindowStepper\n"


def _score(output: str) -> float:
    return float(re.search(r"val_bpb (\S+)", output)[1])  # type: ignore[index]


def test_a_text_is_packed_and_comes_back_and_a_prompt_goes_on(finished_copy: Experiment) -> None:
    finished_copy.copy_code()
    notes = finished_copy.folder / "notes.md"
    notes.write_bytes("Notes — of anything.\r\n".encode())
    for command, expected in ZIPPED.items():
        assert re.search(expected, shell(finished_copy.folder, command)), command
    assert (finished_copy.folder / "again.md").read_bytes() == notes.read_bytes()


@pytest.mark.program("make")
def test_makes_words_for_packed_texts_are_those_commands() -> None:
    lines = re.findall(r"`(make (?:pack|unpack|sample) [^`]*)`", PAGES["compressor"])
    assert len(lines) == 3
    for line in lines:
        planned = shell(REPOSITORY, line.replace("make", "make --dry-run --no-print-directory")).splitlines()[-1]
        words = shlex.split(planned)
        assert any(shlex.split(command)[: len(words)] == words for command in ZIPPED), line


def test_the_shipped_files_score_alone(finished_copy: Experiment) -> None:
    last = shell(finished_copy.folder, "\n".join(ALONE)).splitlines()[-1]
    assert re.match(r"final_sliding_exact val_loss:\S+ val_bpb:\S+ ", last)


@pytest.mark.long
@pytest.mark.program("grep")
def test_the_pipelines_commands_run_in_the_order_of_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "fairway"
    folder.mkdir()
    made = Experiment(folder)
    made.copy_code()
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shell(folder, "git init -q && dvc repro")
    commit(folder)
    for command, expected in PIPELINE.items():
        assert re.search(expected, shell(folder, command)), command
        if command == "dvc queue start":
            shell(folder, "while dvc queue status | grep -Eq 'Running|Queued'; do sleep 2; done")
    shell(folder, "git checkout -q params.yaml dvc.lock results && dvc checkout && dvc push --run-cache")
    commit(folder)

    for command, expected in CLONED.items():
        shell(tmp_path, "git clone -q fairway clone")
        shutil.copy(folder / "corpus.jsonl", tmp_path / "clone")
        assert re.search(expected, shell(tmp_path / "clone", command)), command
    assert "up to date" in shell(tmp_path / "clone", "dvc repro")

    _two_machines(made)


def _two_machines(made: Experiment) -> None:
    """Two launchers of one process each stand for the machines."""
    train, then = MACHINES
    launch = train.replace("HOST", "localhost").replace("--nproc-per-node=4", "--nproc-per-node=1")
    shell(made.folder, f"{launch} & {launch} && wait")
    assert '"processes": 2' in (made.folder / f"artifacts/train/{SEED}/train.json").read_text()
    shell(made.folder, then)
    assert f"train@{SEED}" not in shell(made.folder, "dvc status")


def test_the_tree_names_what_is_there() -> None:
    stages = {path.name for path in (REPOSITORY / "stages").glob("[a-z]*.py")}
    nouns = {path.name + "/" * path.is_dir() for path in (REPOSITORY / "fairway").glob("[a-z]*")}
    wanted = stages | nouns
    assert {"train.py", "evaluation/", "params.py"} <= wanted
    unnamed = {name for name in wanted if not re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", PAGES["tree"])}
    assert unnamed == set()
