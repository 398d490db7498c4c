"""make record: params for so many GPUs, written only where nothing is lost and the machine has what they take."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Experiment, commit, git
from test_readme import PAGES, RECORDS_TABLE

from fairway import machine, step_time
from fairway.chosen_record import MINUTES, Minutes, choose, expectation, record_names
from fairway.params import load_params
from fairway.runtime.errors import UserError
from fairway.step_time import MEASURED_MS, SLOW, judged, step_verdict
from stages import use_record

RECORDS = REPOSITORY / "records"
NAMES = record_names(RECORDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_only_processes_and_what_goes_with_them_differ_from_the_record(name: str, gpus: int) -> None:
    record, chosen = load_params(RECORDS / f"{name}.yaml"), choose(RECORDS, name, gpus)
    longer = 1 if record.processes == 1 else 8 / gpus
    expected = record.model_dump()
    expected["processes"] = gpus
    for key in ("max_wallclock_s", "reserve_s"):
        expected["train"][key] *= longer
    if record.processes == 1:
        expected["train"]["batch_tokens"] *= gpus
        expected["fetch"]["train_shards"] *= gpus
    assert chosen.params.model_dump() == expected
    before = (RECORDS / f"{name}.yaml").read_text().splitlines()
    changed = [line for line in chosen.text.splitlines() if line not in before]
    assert all(
        re.match(r"processes:|  (max_wallclock_s|reserve_s|batch_tokens|train_shards):", line) for line in changed
    ), changed


def test_a_record_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match=rf"^RECORD=r11: no such record; expected one of {', '.join(NAMES)}$"):
        choose(RECORDS, "r11", 8)


@pytest.mark.parametrize("gpus", [0, 3, 16])
def test_processes_that_cannot_share_a_step_are_refused(gpus: int) -> None:
    with pytest.raises(UserError, match=rf"^GPUS={gpus}: .* divides the 8 micro-batches: 1, 2, 4, 8$"):
        choose(RECORDS, "r1172", gpus)


def test_no_processes_are_no_number_either_for_a_record_of_one() -> None:
    with pytest.raises(UserError, match=r"^GPUS=0: .* divides the 1 micro-batches: 1$"):
        choose(RECORDS, "lab-1gpu", 0)


def test_what_to_expect_is_what_the_page_says() -> None:
    rows = [row.split("|")[1:5] for row in RECORDS_TABLE.splitlines()[2:]]
    minutes = {name.strip(): Minutes(int(total), int(shared)) for name, _, total, shared in rows}
    [lab] = re.findall(r"`dvc repro` took (\d+) minutes", PAGES["reproduce"])
    assert minutes == {name: found for name, found in MINUTES.items() if name != "lab-1gpu"}
    assert int(lab) == MINUTES["lab-1gpu"].total
    assert "r1172 at $2.50 is $17 on eight, and on one $12 for 288 minutes" in " ".join(PAGES["reproduce"].split())


@pytest.mark.parametrize(
    ("name", "gpus", "told"),
    [
        ("r1172", 8, "r1172 on 8 GPUs: published 1.1015 bits per byte (slot, mean of 3 seeds); some 50 minutes, $17"),
        # 34 minutes become 34 * 8 / 2, and 16 stay.
        ("r1172", 2, "r1172 on 2 GPUs: published 1.1015 bits per byte (slot, mean of 3 seeds); some 152 minutes, $13"),
        ("r1172", 1, "r1172 on 1 GPU: published 1.1015 bits per byte (slot, mean of 3 seeds); some 288 minutes, $12"),
        (
            "lab-1gpu",
            4,
            "lab-1gpu on 4 GPUs: no published score, since it scores a part of the validation documents; "
            "some 20 minutes, $3",
        ),
    ],
)
def test_fewer_gpus_lengthen_only_what_they_share(name: str, gpus: int, told: str) -> None:
    assert expectation(choose(RECORDS, name, gpus), RECORDS / "published.yaml").startswith(told)


def test_the_gpus_share_at_least_all_training() -> None:
    for name, minutes in MINUTES.items():
        params = load_params(RECORDS / f"{name}.yaml")
        assert params.train.max_wallclock_s is not None
        training_s = len(params.seeds) * (params.train.max_wallclock_s - params.train.reserve_s)
        assert training_s / 60 < minutes.shared < minutes.total


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("r1150-causal-slot", "being a variant of r1150 (1.1151"),
        ("lab-1gpu", "since it scores a part of the validation"),
        ("fairway", "being a record of our own"),
    ],
)
def test_a_record_without_a_published_score_says_so(name: str, told: str) -> None:
    line = expectation(choose(RECORDS, name, 1), RECORDS / "published.yaml")
    assert f"on 1 GPU: no published score, {told}" in line


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that git holds, on a machine with eight GPUs."""
    for name in ("params.yaml", "records"):
        (shutil.copytree if name == "records" else shutil.copy)(REPOSITORY / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    commit(tmp_path, "as it ships")
    plenty = {"free_disk_bytes": 10**12, "ram_bytes": 10**12, "gpu_bytes": [80 * machine.GIB] * 8}
    for name, value in plenty.items():
        monkeypatch.setattr(machine, name, lambda value=value: value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "params.yaml"


def use(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["use_record", *arguments])
    use_record.main()


def test_params_are_written_and_written_again_for_other_gpus(
    eight_gpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for record, gpus in (("r1172", "8"), ("r1172", "8"), ("r1150", "2"), ("lab-1gpu", "1")):
        use(monkeypatch, record, gpus)
        assert eight_gpus.read_text() == choose(RECORDS, record, int(gpus)).text
        assert capsys.readouterr().out.startswith(f"use_record: {record} on {gpus} GPU")


@pytest.mark.parametrize("change", ["\n# mine\n", None])
def test_changes_of_ones_own_are_not_overwritten(
    change: str | None, eight_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they were made in a file that this command wrote, or the file is not even valid."""
    use(monkeypatch, "r1150", "4")
    mine = eight_gpus.read_text() + change if change else "seeds: ["
    eight_gpus.write_text(mine)
    with pytest.raises(UserError, match=r"^params\.yaml: holds changes that git does not; commit them, or `mv "):
        use(monkeypatch, "r1172", "8")
    assert eight_gpus.read_text() == mine
    commit(eight_gpus.parent, "mine")
    use(monkeypatch, "r1172", "8")
    assert eight_gpus.read_text() == choose(RECORDS, "r1172", 8).text


def test_a_machine_without_the_gpus_keeps_its_params(experiment: Experiment) -> None:
    experiment.copy_code()
    git(experiment.folder, "init", "-q")
    commit(experiment.folder, "mine")
    before = (experiment.folder / "params.yaml").read_bytes()
    line = experiment.fails("use_record", "r1172", "2")
    assert line.startswith("error: r1172 with GPUS=2: params.yaml: processes: expected 2 GPUs: this machine has none")
    assert (experiment.folder / "params.yaml").read_bytes() == before
    assert "usage: make record RECORD=<one of fairway, lab-1gpu, r1150" in experiment.fails("use_record", "r1172", "")
    assert experiment.fails("use_record", "", "").endswith("GPUS=<number>; found: nothing")


def test_a_slow_machine_is_told_from_a_fast_one_by_the_benchmarks() -> None:
    results = (REPOSITORY / "benchmarks/RESULTS.md").read_text()
    table = results.partition("## Training speed: one optimizer step")[2].partition("\n\n**")[0]
    rows = [[cell.strip(" *") for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| r")]
    column = 4
    measured = {row[0]: int(row[column].split("*")[0]) for row in rows if row[0] in MEASURED_MS}
    assert measured == MEASURED_MS
    assert judged("r1172", 0, 1.1 * MEASURED_MS["r1172"]).startswith("✓ one training step of r1172 takes 566 ms")
    assert "take another machine" in judged("r1172", 3, 1.01 * SLOW * MEASURED_MS["r1172"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_timed_on_a_gpu() -> None:
    assert re.match(r"[✓✗] one training step of r1172 takes \d+ ms on GPU 0, ", step_verdict("r1172", steps=1))


def test_a_step_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(step_time, "Step", broken)
    assert step_verdict("r1172") == "✗ a training step of r1172 fails on GPU 0: RuntimeError: no compiler"


def test_the_containers_name_files_and_targets_that_are_there() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    assert all((REPOSITORY / word).exists() for word in copied)
    [packages] = [line for line in lines if "apt-get install" in line]
    assert {"gcc", "git", "lrzip", "make", "python3-venv"} <= set(packages.split())
    read = {word for line in lines for word in re.findall(r"-r (\S+)", line)}
    assert read == {"requirements-gpu.txt"}
    editor = json.loads((REPOSITORY / ".devcontainer/devcontainer.json").read_text())
    rules = (REPOSITORY / "Makefile").read_text()
    for line in [*(line for line in lines if line != packages), editor["postCreateCommand"]]:
        for target in re.findall(r"\bmake (\S+)", line):
            assert re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE), target
    assert editor["image"].startswith("python:3.")


@pytest.mark.program("make")
def test_make_writes_params_first_and_then_runs_the_pipeline() -> None:
    command = ["make", "-n", "--no-print-directory", "record", "RECORD=r1172", "GPUS=4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["python -m stages.use_record 'r1172' '4'", "dvc repro"]
