"""Shared by all tests: one thread a process, and experiment folders of their own to run stages in."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import yaml
from filelock import FileLock
from forks import Fork, ranks
from warm_python import warm_environment

if TYPE_CHECKING:
    from reports import Figures

pytest_plugins = ["bare_machine"]

# Examples have no deadline: on a busy machine any of them may take long.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

REPOSITORY = Path(__file__).resolve().parent.parent

# pytest-xdist fills the cores with processes; threads inside them, or inside what they start, would only fight. PyTorch
# reads this when it is imported, which this file leaves to others: the process that only hands out tests needs none.
os.environ["OMP_NUM_THREADS"] = "1"


# Ends what one of several DVC commands prints.
END = "-- end of a command --\n"


def tiny_params(corpus: Path) -> dict[str, Any]:
    """The laptop default at a size that runs in seconds, reading its documents from `corpus`."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["fetch"] = {"source": "file", "path": str(corpus), "column": "text", "shuffle_seed": None}
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
    params["ttt"] |= {"chunk_tokens": 1024, "stride": 16, "epochs": 1}
    params["slot"] |= {"stride": 16, "steps": 2}
    params["sliding"] |= {"stride": 16}
    params["certify"] = {"tokens": 60}
    return params


def write_corpus(path: Path, documents: int = 24, words: int = 150) -> Path:
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


def stage_main(name: str, *arguments: str) -> Callable[[], None]:
    """What `python -m stages.<name> <arguments>` does, as a call for a fork."""
    module = f"stages.{name}"

    def call() -> None:
        sys.argv[1:] = arguments
        for imported in (module, f"{module}.__main__"):
            # Python warns of running a file that a test has imported as a module, too.
            if not hasattr(sys.modules.get(imported), "__path__"):
                sys.modules.pop(imported, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return call


class Experiment:
    """A folder with a params.yaml of its own, in which stages run as a user would run them."""

    def __init__(self, folder: Path) -> None:
        """Made of an empty folder, or found there."""
        self.folder = folder
        if (folder / "params.yaml").exists():
            self.params: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
            return
        self.set_params(tiny_params(write_corpus(folder / "corpus.jsonl")))

    def copy_code(self) -> None:
        """Put the project's code and pipeline into the folder, for what packs, changes or starts it there."""
        if (self.folder / "dvc.yaml").exists():
            return
        for name in ("fairway", "records", "stages"):
            shutil.copytree(REPOSITORY / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(REPOSITORY / name, self.folder / name)

    def set_params(self, params: dict[str, Any]) -> None:
        """Write params.yaml."""
        self.params = params
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def run(self, *command: str, ok: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command as a process of its own and check whether it ended well.

        `python`, also where the command starts it, is the warm one, and the code that it runs is the folder's.
        """
        self.copy_code()
        environment = warm_environment()
        head = shutil.which(command[0], path=environment["PATH"]) or command[0]
        done = subprocess.run(
            [head, *command[1:]], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout
        )
        assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *commands: str) -> list[str]:
        """Run DVC's commands one after another by one process, since it takes a second to start; what each prints."""
        lines = ["import shlex", "from dvc.cli import main", f"for command in {commands!r}:"]
        lines += ["    assert main(shlex.split(command)[1:]) == 0, command", f"    print({END!r}, flush=True)"]
        return self.run("python", "-c", "\n".join(lines)).stdout.split(END)[:-1]

    def stage(self, name: str, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one stage of the repository's code in the folder, by a fork, and check whether it ended well."""
        import torch

        if torch.cuda.is_available():
            return self.run("python", "-m", f"stages.{name}", *arguments, ok=ok)
        done = Fork(stage_main(name, *arguments), self.folder).wait()
        assert (done.returncode == 0) == ok, f"{name} {arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def stage_of_processes(self, processes: int, name: str, *arguments: str) -> list[str]:
        """Run one stage in the folder as so many ranks, which must end well; what each of them prints."""
        return [done.stdout for done in ranks(stage_main(name, *arguments), self.folder, processes=processes)]

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
        self.copy_code()
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
    # Imports PyTorch, which this file must not do before it has set the number of threads.
    from fairway.runtime.files import output_folder

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
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A cloned project with a tiny experiment, run once by DVC and committed (shared: do not change it)."""

    def make(made: Experiment) -> None:
        made.copy_code()
        (made.folder / ".dvc").mkdir()
        shutil.copy(REPOSITORY / ".dvc/config", made.folder / ".dvc/config")
        git(made.folder, "init", "-q")
        commit(made.folder, "the project")
        made.run("dvc", "repro")
        commit(made.folder, "its first run")

    return once(tmp_path_factory, "reproduced", make)


def commit(folder: Path, message: str) -> None:
    """Commit everything."""
    git(folder, "add", ".")
    git(folder, "commit", "-qm", message)


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody; what it prints."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, reproduced: Experiment) -> Experiment:
    """An experiment with every stage up to compress run once (shared: do not change it, copy from it)."""

    def make(made: Experiment) -> None:
        made.copy_code()
        shutil.copytree(reproduced.folder / "data", made.folder / "data")
        for name in ("tokens", "train", "average", "adapt", "quantize", "pack", "compress"):
            shutil.copytree(reproduced.folder / "artifacts" / name, made.folder / "artifacts" / name)

    return once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, finished: Experiment, reproduced: Experiment) -> Experiment:
    """An experiment weighed and scored by three evaluators as well (shared: do not change it, copy from it)."""

    def make(made: Experiment) -> None:
        shutil.copytree(finished.folder / "artifacts", made.folder / "artifacts")
        for name in ("size_check", "evaluate"):
            shutil.copytree(reproduced.folder / "artifacts" / name, made.folder / "artifacts" / name)

    return once(tmp_path_factory, "evaluated", make)


@pytest.fixture
def finished_copy(tmp_path: Path, finished: Experiment) -> Experiment:
    """A private copy of `finished`, to damage."""
    made = Experiment(tmp_path)
    for name in ("data", "artifacts"):
        shutil.copytree(finished.folder / name, made.folder / name)
    return made


@pytest.fixture
def one(tmp_path: Path, evaluated: Experiment) -> "Figures":
    """What the report reads of a run with one seed."""
    from reports import Figures

    return Figures(tmp_path, evaluated)


@pytest.fixture
def three(one: "Figures") -> "Figures":
    """The same with two further seeds, one of which scores worse and one better."""
    one.add_seeds({42: 0.002, 2025: -0.001})
    return one
