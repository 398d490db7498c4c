"""Shared by all tests: one thread a process, and experiment folders of their own to run stages in."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from fairway.runtime.files import output_folder

REPOSITORY = Path(__file__).resolve().parent.parent

# pytest-xdist fills the cores with processes; threads inside them, or inside what they start, would only fight.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def tiny_params(corpus: Path) -> dict[str, Any]:
    """The laptop default at a size that runs in seconds, reading its documents from `corpus`."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["fetch"] = {"source": "file", "path": str(corpus)}
    params["tokenize"] |= {"vocab_size": 320, "val_documents": 4}
    params["model"] |= {"vocab_size": 320, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "mlp_hidden": 64}
    params["model"] |= {"seq_len": 64, "xsa_last_layers": 1}
    params["model"]["rope"] |= {"dims": 8}
    params["model"]["bigram"] |= {"buckets": 64, "width": 16}
    params["model"]["value_embedding"] |= {"width": 16, "layers": [1]}
    params["train"] |= {"max_steps": 12, "batch_tokens": 512, "micro_batch_tokens": 256}
    params["train"] |= {"log_every": 2, "val_every": 6, "checkpoint_every": 3}
    params["train"]["swa"] |= {"below_lr": 0.9, "every": 2}
    params["average"] |= {"method": "ema"}
    params["quantize"]["passthrough_elements"] = 256
    params["ttt"] |= {"chunk_tokens": 1024, "stride": 16}
    params["slot"] |= {"stride": 16}
    params["sliding"] |= {"stride": 16}
    params["certify"] = {"tokens": 60}
    return params


def write_corpus(path: Path, documents: int = 24, words: int = 220) -> Path:
    """JSONL of small documents of made-up words, frequent ones first: enough to learn from, the same every time."""
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    lines = []
    for _ in range(documents):
        text = " ".join(rng.choices(vocabulary, weights, k=words))
        lines.append(json.dumps({"text": text.capitalize() + ".\n\nÉnd — 1999\n"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def launch(folder: Path, program: str, *, processes: int) -> None:
    """Run a Python program in the folder as so many processes of torchrun; it may import the project and its tests."""
    paths = f"import sys\nsys.path[:0] = {[str(REPOSITORY / 'tests'), str(REPOSITORY)]}\n"
    (folder / "ranks.py").write_text(paths + program)
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "ranks.py"]
    subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True, capture_output=True, timeout=240)


class Experiment:
    """A folder with the project's code and a params.yaml of its own, in which stages run as a user would run them."""

    def __init__(self, folder: Path) -> None:
        """Made of an empty folder, or found there."""
        self.folder = folder
        if (folder / "params.yaml").exists():
            self.params: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
            return
        for name in ("fairway", "records", "stages"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(REPOSITORY / name, folder / name)
        self.set_params(tiny_params(write_corpus(folder / "corpus.jsonl")))

    def set_params(self, params: dict[str, Any]) -> None:
        """Write params.yaml."""
        self.params = params
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def run(self, *command: str, ok: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder (`python` is this interpreter) and check whether it ended well."""
        head = [sys.executable] if command[0] == "python" else [str(Path(sys.executable).parent / command[0])]
        done = subprocess.run([*head, *command[1:]], cwd=self.folder, capture_output=True, text=True, timeout=timeout)
        assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def stage(self, name: str, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one stage."""
        return self.run("python", "-m", f"stages.{name}", *arguments, ok=ok)

    def fails(self, name: str, *arguments: str) -> str:
        """Run a stage that must refuse its input; return its one line on stderr."""
        done = self.stage(name, *arguments, ok=False)
        lines = done.stderr.strip().splitlines()
        assert "Traceback" not in done.stderr, done.stderr
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: "), done.stderr
        return lines[0]

    def printed_as_sources_change(self, code: str, *sources: str) -> list[str]:
        """The line that `code` prints at first, and again after a comment is added to each of these files in turn."""
        lines = [f"code = {code!r}", "exec(code)"]
        for source in sources:
            lines += [f"with open({source!r}, 'a') as file: file.write('# changed\\n')", "exec(code)"]
        return self.run("python", "-c", "\n".join(lines)).stdout.split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that two workers end together."""
    longest = ("pipeline", "train", "bundle", "evaluate", "collect", "records", "adapt", "fetch", "certify_stage")
    order = {f"test_{name}.py": place for place, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A fresh experiment folder."""
    return Experiment(tmp_path)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Experiment], None]) -> Experiment:
    """An experiment that all processes of pytest-xdist share: the first that asks for it makes it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            with output_folder(base / name) as folder:
                make(Experiment(folder))
    return Experiment(base / name)


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment whose fetch and tokenize stages have run (shared: do not change it, copy from it)."""

    def make(made: Experiment) -> None:
        made.stage("fetch")
        made.stage("tokenize")

    return once(tmp_path_factory, "tokenized", make)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenized: Experiment) -> Experiment:
    """An experiment with every stage up to compress run once (shared: do not change it, copy from it)."""

    def make(made: Experiment) -> None:
        for name in ("data", "artifacts"):
            shutil.copytree(tokenized.folder / name, made.folder / name)
        for stage in ("train", "average", "adapt", "quantize", "compress"):
            made.stage(stage, "1337")

    return once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, finished: Experiment) -> Experiment:
    """An experiment weighed and scored by three evaluators as well (shared: do not change it, copy from it)."""

    def make(made: Experiment) -> None:
        shutil.copytree(finished.folder / "artifacts", made.folder / "artifacts")
        made.stage("size_check", "1337")
        for evaluator in made.params["evaluators"]:
            made.stage("evaluate", "1337", evaluator)

    return once(tmp_path_factory, "evaluated", make)


@pytest.fixture
def finished_copy(tmp_path: Path, finished: Experiment) -> Experiment:
    """A private copy of `finished`, to damage."""
    made = Experiment(tmp_path)
    for name in ("data", "artifacts"):
        shutil.copytree(finished.folder / name, made.folder / name)
    return made
