"""Every line that docs/faq.md shows is what the code says, in the order of the page."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import REPOSITORY, commit, git
from test_certify import BYTES, CLEAN, METRICS, NATS, TEXT, UNTOLD
from test_readme import PAGES

from fairway import machine
from fairway.certification.accounting import Evaluation, accounting
from fairway.codec.artifact import over_cap
from fairway.codec.byte_codecs import lrzip_program
from fairway.machine import GIB
from fairway.params import load_params
from fairway.preflight import check_machine
from fairway.reporting.runs import Score
from fairway.reporting.tables import _row, _score_row
from fairway.runtime.distributed import World
from fairway.runtime.errors import UserError
from fairway.step_time import judged
from fairway.tokens.hub import FetchHub, Repository
from fairway.tokens.sdists import FetchSdists, download_sdist
from fairway.training.training_files import memory_named
from stages import use_record

Patch = pytest.MonkeyPatch
BLOCKS = re.findall(r"^```text\n(.*?)^```", PAGES["faq"], flags=re.MULTILINE | re.DOTALL)
SHOWN = [line for block in BLOCKS for line in block.splitlines()]


def error(work: Callable[[], object]) -> str:
    """The line that a stage prints for the UserError of some work."""
    with pytest.raises(UserError) as told:
        work()
    return f"error: {told.value}"


def on_machine(patch: Patch, **found: Any) -> None:
    """Let the machine have plenty of all, but for what is named."""
    plenty = {"free_disk_bytes": 10**12, "ram_bytes": 10**12, "gpu_bytes": [80 * GIB] * 8, "cores": 2}
    for name, value in (plenty | found).items():
        patch.setattr(machine, name, lambda value=value: value)


def record(name: str) -> Any:
    return load_params(REPOSITORY / f"records/{name}.yaml")


def make_record(patch: Patch, folder: Path, *, more: str = "") -> str:
    """What `make record RECORD=r1172 GPUS=1` says in a repository whose params.yaml got more text."""
    for name in ("params.yaml", "records"):
        (shutil.copytree if name == "records" else shutil.copy)(REPOSITORY / name, folder / name)
    git(folder, "init", "-q")
    commit(folder, "as it ships")
    with (folder / "params.yaml").open("a") as file:
        file.write(more)
    on_machine(patch, gpu_bytes=[])
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["use_record", "r1172", "1"])
    return error(use_record.main)


def too_little(patch: Patch, _: Path, **found: Any) -> str:
    """What r1172 is refused with on a machine that has only so much of something."""
    on_machine(patch, **found)
    return error(lambda: check_machine(record("r1172"), fetched=False))


def out_of_gpu_memory(patch: Patch, _: Path) -> str:
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * GIB)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: card)

    def train() -> None:
        with memory_named(record("r1172").train, World(0, 1, torch.device("cuda", 0))):
            raise torch.OutOfMemoryError

    return error(train)


def no_lrzip(patch: Patch, folder: Path) -> str:
    patch.setenv("PATH", str(folder))
    return error(lrzip_program)


def attention(patch: Patch, _: Path) -> str:
    on_machine(patch)
    patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    patch.setattr(machine, "attention_backend", lambda *_, packed, length: "flash2" if packed else "cudnn")
    return machine.description()[-1]


def no_hub(patch: Patch, folder: Path) -> str:
    """Told to look at its cache alone, the library fails as it does where nothing answers, half a minute sooner."""
    alone = partial(huggingface_hub.hf_hub_download, local_files_only=True)
    patch.setattr(huggingface_hub, "hf_hub_download", alone)
    hub = record("r1172").fetch
    assert isinstance(hub, FetchHub)
    return error(lambda: Repository(hub, folder).file("manifest.json"))


def no_index(patch: Patch, folder: Path) -> str:
    """An index with nothing in it."""
    (folder / "sdist").mkdir()
    patch.setenv("PIP_NO_INDEX", "1")
    fetch = load_params(REPOSITORY / "params.yaml").fetch
    assert isinstance(fetch, FetchSdists)
    return error(lambda: download_sdist(fetch.sdists[0], folder / "sdist"))


# docs/log.md, "Beside PR #1855's program", and the codes of the MLP in benchmarks/RESULTS.md.
TOO_LARGE = {
    "total_bytes": 16_002_293,
    "train_gpt_bytes": 24_665,
    "model_bytes": 15_977_628,
    "cap_bytes": 16_000_000,
    "headroom_bytes": -2_293,
    "classes": {"mlp": {"bytes": 5_032_309 + 5_030_391}, "attn": {"bytes": 1_195_764}},
}


def unproven(metrics: dict[str, Any], calibration: str | None, repeated: int) -> str:
    """Why the accounting of such an evaluation is unproven."""
    made_from, text = replace(CLEAN, calibration=calibration), replace(TEXT, repeated=repeated)
    found = accounting(Evaluation(METRICS | metrics, NATS, 10, made_from, text), BYTES, UNTOLD, cap_bytes=10)
    assert found.verdict == "unproven"
    return found.why


def no_git(_: Patch, __: Path) -> str:
    """What the Makefile says; tests/test_readme.py sees it say so."""
    [told] = re.findall(r"echo '(error: not a git[^']*)'", (REPOSITORY / "Makefile").read_text())
    return str(told)


# In the order of the page.
TOLD: dict[str, Callable[[Patch, Path], str]] = {
    "refused": make_record,
    "own changes": partial(make_record, more="# mine\n"),
    "host's memory": partial(too_little, ram_bytes=24 * GIB),
    "GPU's memory": partial(too_little, gpu_bytes=[16 * GIB] * 8),
    "out of memory": out_of_gpu_memory,
    "lrzip": no_lrzip,
    "attention": attention,
    "hub": no_hub,
    "index": no_index,
    "slow": lambda *_: judged("r1172", 2, 1030),
    "cap": lambda *_: f"error: artifacts/compress/42: {over_cap(TOO_LARGE)}",
    "unproven": lambda *_: _row(_score_row(Score("sliding", [1.5895], "unproven", []))),
    "seconds": lambda *_: unproven({"eval_s": 900.0}, None, 0),
    "calibration": lambda *_: unproven({}, "text", 0),
    "repeated": lambda *_: unproven({}, None, 3),
    "git": no_git,
}


@pytest.mark.parametrize(("name", "shown"), [*zip(TOLD, SHOWN, strict=True)], ids=TOLD)
def test_a_line_of_the_page_is_what_the_code_says(name: str, shown: str, monkeypatch: Patch, tmp_path: Path) -> None:
    assert TOLD[name](monkeypatch, tmp_path) == shown


def test_what_a_run_changed_is_undone_as_the_page_says(tmp_path: Path) -> None:
    """Also dvc.lock, which DVC adds to the index (core.autostage), so that the index is no place to take it from."""
    assert "autostage = true" in (REPOSITORY / ".dvc/config").read_text()
    [shown] = re.findall(r"^```console\n(.*?)^```", PAGES["faq"], flags=re.MULTILINE | re.DOTALL)
    [undo] = re.findall(r"`git (checkout [^`]*)`", PAGES["faq"])
    lock, summary = tmp_path / "dvc.lock", tmp_path / "results/summary.json"
    summary.parent.mkdir()
    for text in ("before", "after"):
        lock.write_text(text)
        summary.write_text(text)
        if text == "before":
            git(tmp_path, "init", "-q")
            commit(tmp_path, "before")
    git(tmp_path, "add", "dvc.lock")
    assert git(tmp_path, "status", "--short") == shown
    git(tmp_path, *undo.split())
    assert git(tmp_path, "status", "--short") == ""
