"""make doctor: one table of what a machine lacks for each record, and no machine on which it fails."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Experiment, stage_main
from forks import Fork

import stages.doctor as doctor_stage
from fairway import machine
from fairway.chosen_record import choose
from fairway.machine import GIB
from fairway.params import load_params
from fairway.preflight import PINNED, Check, check_machine, cpu_hours, fewer_processes, remedies, table, verdict
from fairway.runtime.errors import UserError

# Nothing listens on the port that discards what it is sent.
NOWHERE = "http://127.0.0.1:9"


class _Refusing(BaseHTTPRequestHandler):
    """Answers, if only with an error."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a server."""
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def doctor(experiment: Experiment, endpoint: str, *programs: str) -> str:
    """What it prints with that hub and nothing but those programs on the PATH."""
    folder = experiment.folder
    shutil.copytree(REPOSITORY / "records", folder / "records", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "requirements.txt", folder)
    for record in (folder / "records").glob("*.yaml"):
        record.write_text(re.sub(r"endpoint: .*", f"endpoint: {endpoint}", record.read_text()))
    path = folder / "bin"
    path.mkdir()
    for program in programs:
        (path / program).write_text("#!/bin/sh\n")
        (path / program).chmod(0o755)
    done = Fork(stage_main("doctor"), folder, {"PATH": str(path), "CUDA_VISIBLE_DEVICES": ""}).wait()
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def marks(output: str, need: str) -> list[str]:
    """The row of a need: of params.yaml and of the records with a column."""
    row = next(line for line in output.splitlines() if line.startswith(need + " "))
    return row.removeprefix(need).split()


def test_a_bare_machine_lacks_programs_hub_and_gpus(experiment: Experiment) -> None:
    output = doctor(experiment, NOWHERE)
    head = next(line for line in output.splitlines() if "r1150" in line)
    assert head.split() == ["params.yaml", "fairway", "lab-1gpu", "r1150", "r1172", "r1488", "r1958"]
    assert marks(output, "lrzip") == [*"······", "✗"]
    assert marks(output, "dvc") == ["✗"] * 7
    assert marks(output, "hub reachable") == ["·", *"✗✗✗✗✗✗"]
    assert marks(output, "8 GPUs") == ["·", "✗", "·", *"✗✗✗✗"]
    assert marks(output, "1 GPU") == ["·", "·", "✗", *"····"]
    assert marks(output, "documents") == ["✓", *"······"]
    assert output.splitlines()[-1] == "This machine can run: none of these as it is"
    assert "\n✗ lrzip (r1958): apt-get install lrzip" in output
    needed_by = "fairway, lab-1gpu, r1150, r1172, r1488, r1958"
    assert f"\n✗ hub reachable ({needed_by}): let this machine reach {NOWHERE}" in output


def test_what_is_there_is_ticked(experiment: Experiment, hub: str) -> None:
    output = doctor(experiment, hub, "lrzip", "dvc", "git")
    assert marks(output, "lrzip") == [*"······", "✓"]
    for need in ("dvc", "git", "torchrun"):
        assert marks(output, need) == ["✓"] * 7
    assert marks(output, "hub reachable") == ["·", *"✓✓✓✓✓✓"]
    assert "✗ lrzip" not in output
    assert output.splitlines()[-1] == "This machine can run: params.yaml (`make repro`)"


def test_a_params_file_with_a_fault_is_one_line_and_the_rest_is_shown_all_the_same(experiment: Experiment) -> None:
    experiment.set_params(experiment.params | {"processes": "many"})
    output = doctor(experiment, NOWHERE)
    assert output.startswith("GPUs       0: none")
    head = next(line for line in output.splitlines() if "r1150" in line)
    assert head.split() == ["fairway", "lab-1gpu", "r1150", "r1172", "r1488", "r1958"]
    assert [line for line in output.splitlines() if "params.yaml" in line] == [
        "✗ params.yaml: processes: Input should be a valid integer (found 'many')"
    ]
    assert "\n✗ lrzip (r1958): apt-get install lrzip" in output


@pytest.mark.parametrize("text", [None, "", "seeds: [", "seeds: [1]\n"])
def test_even_without_any_valid_params_file_the_machine_is_shown(text: str | None, tmp_path: Path) -> None:
    """None stands for a file that is not there."""
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    done = Fork(stage_main("doctor"), tmp_path, {"CUDA_VISIBLE_DEVICES": ""}).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GPUs       0: none")
    assert done.stdout.splitlines()[-1].startswith("✗ params.yaml: ")
    assert "Nothing is missing" not in done.stdout


def test_several_processes_without_a_compiler_need_no_gpu_where_there_is_none(experiment: Experiment) -> None:
    experiment.set_params(experiment.params | {"processes": 2})
    output = doctor(experiment, NOWHERE)
    assert marks(output, "8 GPUs") == ["·", "✗", "·", *"✗✗✗✗"]
    assert "2 GPUs" not in output


@pytest.mark.parametrize(
    ("record", "gpus", "remedy"),
    [
        # (600 - 192) * 8 / 2 + 192
        ("r1488-train-ttt", 2, "processes: 2 and train.max_wallclock_s: 1824.0 give as many steps"),
        ("r1150", 1, "processes: 1 and train.max_wallclock_s: 4800.0 give as many steps"),
        ("r1150", 7, "processes: 4 and train.max_wallclock_s: 1200.0 give as many steps"),
    ],
)
def test_fewer_gpus_take_longer_but_reserve_no_more(record: str, gpus: int, remedy: str) -> None:
    assert fewer_processes(load_params(REPOSITORY / f"records/{record}.yaml"), gpus) == remedy


@pytest.mark.parametrize(
    ("wanted", "gpus", "tokens"), [(2, 1, 98_304), (4, 2, 196_608), (4, 3, 294_912), (8, 4, 393_216)]
)
def test_a_lab_on_fewer_gpus_keeps_its_seconds_and_takes_smaller_steps(wanted: int, gpus: int, tokens: int) -> None:
    """As records/lab-1gpu.yaml says beside its clock. What is advised is what `make record` then writes."""
    params = choose(REPOSITORY / "records", "lab-1gpu", wanted).params
    remedy = fewer_processes(params, gpus)
    assert remedy == (
        f"processes: {gpus} and train.batch_tokens: {tokens} keep its seconds, as make record RECORD=lab-1gpu "
        f"GPUS={gpus} sets them"
    )
    advised = choose(REPOSITORY / "records", "lab-1gpu", gpus).params
    assert (advised.processes, advised.train.batch_tokens) == (gpus, tokens)
    assert advised.train.max_wallclock_s == params.train.max_wallclock_s


def test_who_has_the_lab_already_is_not_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_bytes", lambda: [80 * machine.GIB] * 2)
    for name, sent in (("lab-1gpu", False), ("fairway", True)):
        with pytest.raises(UserError, match="expected 4 GPUs: this machine has 2; processes: 2 and train") as refused:
            check_machine(choose(REPOSITORY / "records", name, 4).params, fetched=True)
        assert ("or take records/lab-1gpu.yaml" in str(refused.value)) == sent


def test_a_lab_with_the_records_clock_takes_longer_as_a_record_does(tmp_path: Path) -> None:
    """Its file says how to come to the steps of the record; with those settings it goes by the record's rule."""
    text = choose(REPOSITORY / "records", "lab-1gpu", 4).text
    for key, value in (("max_wallclock_s", "1200.0"), ("reserve_s", "24.0"), ("batch_tokens", "786432")):
        text, count = re.subn(rf"^  {key}:.*$", f"  {key}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "params.yaml").write_text(text)
    remedy = "processes: 2 and train.max_wallclock_s: 2376.0 give as many steps"
    assert fewer_processes(load_params(tmp_path / "params.yaml"), 2) == remedy


def test_a_run_without_a_time_limit_only_needs_fewer_processes() -> None:
    assert fewer_processes(load_params(REPOSITORY / "params.yaml"), 1) == "processes: 1 takes as many steps"


@pytest.mark.parametrize("record", ["r1172", "lab-1gpu"])
def test_a_record_is_refused_without_gpus_before_anything_is_fetched(record: str, experiment: Experiment) -> None:
    """By its work, whatever its name: some 20,000 hours on two cores."""
    shutil.copy(REPOSITORY / f"records/{record}.yaml", experiment.folder / "params.yaml")
    for arguments in (("fetch",), ("train", "--check", load_params(experiment.folder / "params.yaml").seeds[0])):
        line = experiment.fails(*map(str, arguments))
        expected = r"error: params\.yaml: processes: expected (8 GPUs|1 GPU): this machine has none, .* [\d,]+ hours; "
        # Who already asks for one GPU is not sent to the record for one.
        other = "" if "expected 1 GPU" in line else r"records/lab-1gpu\.yaml is for one GPU \(processes: 1\), and "
        assert re.match(expected + other + r"the laptop default is for a CPU", line), line
    assert not (experiment.folder / "data").exists()


def test_with_too_few_gpus_the_line_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_bytes", lambda: [80 * machine.GIB] * 2)
    told = r"processes: expected 8 GPUs: this machine has 2; processes: 2 and train\.max_wallclock_s: 2400\.0 give"
    with pytest.raises(UserError, match=told):
        check_machine(load_params(REPOSITORY / "records/r1150.yaml"), fetched=True)


@pytest.mark.parametrize(
    ("have", "fetched", "told"),
    [
        (
            {"free_disk_bytes": 10**9},
            False,
            r"fetch\.train_shards: expected disk: 6 GB are needed on this disk, 1 are free",
        ),
        ({"free_disk_bytes": 10**9}, True, r"seeds: expected disk: 2 GB are needed"),
        ({"ram_bytes": 10**9}, False, r"processes: expected memory: 4 GiB are needed, 1 are here"),
        ({"gpu_bytes": [24 * 2**30]}, False, r"train\.micro_batch_tokens: expected GPU memory: 38 GiB on each"),
    ],
)
def test_each_lack_names_the_key_that_asks_for_it(
    have: dict[str, Any], fetched: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = {"free_disk_bytes": 10**12, "ram_bytes": 10**12, "gpu_bytes": [80 * 2**30]}
    for name, value in (plenty | have).items():
        monkeypatch.setattr(machine, name, lambda value=value: value)
    with pytest.raises(UserError, match=told):
        check_machine(load_params(REPOSITORY / "records/lab-1gpu.yaml"), fetched=fetched)


def test_the_laptop_default_needs_no_gpu() -> None:
    """The time that it is said to take decides nothing, but must be near: 270 s on two cores."""
    params = load_params(REPOSITORY / "params.yaml")
    assert 3600 * cpu_hours(params) * machine.cores() == pytest.approx(540, rel=0.2)
    check_machine(params, fetched=False)


def test_variants_share_the_column_of_their_record_unless_they_need_more() -> None:
    disk, more = Check("disk", True, ""), Check("lrzip", False, "install it")
    checks = {"r1": [disk], "r1-same": [Check("disk", True, "delete")], "r1-other": [disk, more]}
    assert table(checks)[0].split() == ["r1", "r1-other"]
    assert table(checks)[-1] == "r1-same: as r1"
    assert remedies(checks) == ["✗ lrzip (r1-other): install it"]


def test_other_versions_than_the_pinned_ones_keep_no_record_from_running() -> None:
    other, lacking = Check(PINNED, False, "pip install"), Check("disk", False, "delete")
    checks = {"params.yaml": [other], "r1": [lacking], "lab-1gpu": [Check("disk", True, "")]}
    assert verdict(checks) == ["This machine can run: params.yaml (`make repro`), lab-1gpu"]
    assert verdict({}) == []


def test_every_gpu_is_timed_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that pretends to have two, which the processes do not find."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    monkeypatch.setattr(doctor_stage, "gpu_bytes", lambda: [80 * GIB] * 2)
    lines = doctor_stage.speed({})
    assert [line.partition(":")[0] for line in lines] == [
        f"✗ a training step of r1172 fails on GPU {gpu}" for gpu in (0, 1)
    ]
    assert [machine.visible_device(gpu) for gpu in (0, 1)] == ["7", "5"]


def test_a_process_that_ends_without_a_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    monkeypatch.setattr(doctor_stage, "gpu_bytes", lambda: [80 * GIB])
    assert doctor_stage.speed({}) == ["✗ the process that times GPU 0 ended without a word"]


def test_where_nothing_is_missing_it_says_so() -> None:
    assert remedies({"r1": [Check("disk", True, "")]}) == ["Nothing is missing."]


@pytest.mark.parametrize("arguments", [("r1172",), ("--step",), ("--step", "r11", "0"), ("--step", "r1172", "first")])
def test_other_arguments_are_told_in_one_line(arguments: tuple[str, ...], experiment: Experiment) -> None:
    usage = r"error: usage: python -m stages\.doctor, or with --step <one of r1150, .*> <GPU>; found: "
    assert re.match(usage + " ".join(arguments), experiment.fails("doctor", *arguments))


@pytest.mark.program("make")
def test_it_is_a_target_of_make() -> None:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "doctor"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "python -m stages.doctor"
    assert not Path(REPOSITORY / "doctor").exists()
