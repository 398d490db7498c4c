"""train_gpt.py: one file that holds a whole program."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Experiment

from model.gpt import GPT
from stages.compress.bundle import bundle, import_closure, minify
from stages.compress.container import pack
from stages.compress.settings import read_settings, shipped_settings, unused_modules
from stages.params import Params, load_params
from stages.quantize.state import quantize_state


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A small repository: an entry, a package with __init__, a folder without, a module nobody imports."""
    root = tmp_path / "repository"
    files = {
        "app/__init__.py": '"""App."""\nNAME = "app"\n',
        "app/__main__.py": (
            '"""Entry."""\nimport json\nfrom app import NAME\nfrom app.parts import shapes\n\n\n'
            "def run_shipped(settings: dict[str, float]) -> None:\n"
            '    """Doc."""\n    from lib.late import late\n    side_length = settings["side"]\n'
            "    print(json.dumps([NAME, shapes.Square(side=side_length).area(), late(), __name__]))\n"
        ),
        "app/parts/shapes.py": (
            "from pydantic import BaseModel\n\n\nclass Square(BaseModel):\n    side: float\n\n"
            "    def area(self) -> float:\n        # a comment\n        return self.side**2\n"
        ),
        "app/unused.py": "raise SystemExit('imported')\n",
        "lib/late.py": "import inspect\n\n\ndef late() -> int:\n    return len(inspect.getsource(late)) > 10\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "stages/compress").mkdir(parents=True)
    (root / "stages/compress/importer.py").write_text((REPOSITORY / "stages/compress/importer.py").read_text())
    return root


def _run_alone(file: bytes, folder: Path, *arguments: str) -> str:
    """Run the file in an empty folder, isolated: no current folder, no PYTHONPATH, no user site on the path."""
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_bytes(file)
    command = [sys.executable, "-I", "-W", "error", "train_gpt.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_file_runs_alone_and_calls_the_entry_with_its_settings(program: Path, tmp_path: Path) -> None:
    file = bundle(program, "app.__main__", {"side": 1.5})
    assert json.loads(_run_alone(file, tmp_path / "alone")) == ["app", 2.25, True, "app.__main__"]


def test_the_closure_is_what_is_imported_and_no_more(program: Path) -> None:
    found = import_closure(program, "app.__main__")
    assert set(found) == {"app", "app.__main__", "app.parts", "app.parts.shapes", "lib", "lib.late"}


def test_a_module_left_out_is_imported_all_the_same(program: Path, tmp_path: Path) -> None:
    (program / "app/extra.py").write_text("from app import unused\nSHAPES = 1\n")
    entry = program / "app/__main__.py"
    entry.write_text("from app.extra import SHAPES, Other\n" + entry.read_text())
    file = bundle(program, "app.__main__", {"side": 1.5}, leave_out=["app.extra"])
    assert json.loads(_run_alone(file, tmp_path / "alone"))[0] == "app"
    assert "app.unused" not in import_closure(program, "app.__main__", ["app.extra"])


def test_a_bundle_is_a_module_too_and_then_runs_nothing(program: Path, tmp_path: Path) -> None:
    """Processes that multiprocessing spawns import the main file again."""
    (tmp_path / "train_gpt.py").write_bytes(bundle(program, "app.__main__", {}))
    command = [sys.executable, "-c", "import train_gpt, app.parts.shapes as s; print(s.Square(side=2).area())"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "4.0\n"


def test_tracebacks_name_the_module(program: Path, tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(bundle(program, "app.__main__", {}))
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'File "train_gpt/app/__main__.py"' in done.stderr
    assert "KeyError: 'side'" in done.stderr


def test_equal_repositories_give_equal_bytes(program: Path) -> None:
    assert bundle(program, "app.__main__", {"a": 1}) == bundle(program, "app.__main__", {"a": 1})
    before = bundle(program, "app.__main__", {})
    (program / "app/unused.py").write_text("CHANGED = 1\n")
    assert bundle(program, "app.__main__", {}) == before
    (program / "lib/late.py").write_text("def late():\n    return 2\n")
    assert bundle(program, "app.__main__", {}) != before


def test_the_file_is_three_lines_of_ascii(program: Path) -> None:
    text = bundle(program, "app.__main__", {}).decode("ascii")
    assert len(text.splitlines()) == 3
    ast.parse(text)


def test_minifying_keeps_fields_and_what_triton_reads() -> None:
    model = "class A(Section):\n    side: int = Field(gt=0)\n\n\ndef f(argument: int) -> int:\n    return argument\n"
    assert "side:int" in minify(model)
    assert "argument:int" not in minify(model)
    kernel = (
        "import triton\n\n\n@triton.jit\ndef f(x, block: tl.constexpr):\n    offset = x + block\n    return offset\n"
    )
    assert "block:tl.constexpr" in minify(kernel)
    assert "offset" in minify(kernel)


def test_every_module_of_the_record_still_compiles_when_minified() -> None:
    modules = import_closure(REPOSITORY, "stages.__main__")
    assert {"stages.compress.container", "model.config", "stages.quantize.codes"} <= set(modules)
    for name, source in modules.items():
        compile(minify(source), name, "exec")
        assert not re.search(r"^\s*(import|from) dvc", source, flags=re.MULTILINE), name


def test_settings_carry_the_record_and_nothing_else(tmp_path: Path) -> None:
    params = load_params(REPOSITORY / "params.yaml")
    settings = json.loads(json.dumps(shipped_settings(params, 7)))
    found, seed = read_settings(settings)
    assert seed == 7
    assert found.model == params.model
    assert found.quantize == params.quantize
    assert getattr(found, params.compress.evaluator) == getattr(params, params.compress.evaluator)
    assert not {"size_check", "fetch", "evaluators"} & set(settings["sections"])


def test_settings_do_not_change_with_another_evaluators_section() -> None:
    raw = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    before = shipped_settings(Params.model_validate(raw), 1)
    raw["slot"]["steps"] += 1
    assert shipped_settings(Params.model_validate(raw), 1) == before


@pytest.fixture(scope="module")
def folder(tokenized: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a judge has: the tokens, a model.bin (of initial weights), and train_gpt.py."""
    made = tmp_path_factory.mktemp("folder")
    for path in (tokenized.folder / "artifacts/tokens").glob("val_*.bin"):
        shutil.copy(path, made)
    shutil.copy(tokenized.folder / "artifacts/tokens/tokenizer.model", made)
    params = Params.model_validate(tokenized.params)
    model = GPT(params.model)
    model.init_weights(7)
    state, _ = quantize_state(model.state_dict(), params.quantize)
    (made / "model.bin").write_bytes(pack(params.model, state, codec=params.compress.codec))
    settings = shipped_settings(params, 7)
    program = bundle(REPOSITORY, "stages.__main__", settings, leave_out=unused_modules(params))
    (made / "train_gpt.py").write_bytes(program)
    return made


def _score(output: str) -> float:
    return float(re.search(r"^val_bpb: (\d+\.\d{8,})$", output, flags=re.MULTILINE)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def scored(folder: Path) -> str:
    """What the shipped program says of the shipped model."""
    return _run_alone((folder / "train_gpt.py").read_bytes(), folder)


def test_the_shipped_program_scores_the_shipped_model_alone(scored: str) -> None:
    assert 2 < _score(scored) < 20
    assert "val_loss: " in scored


def test_the_repository_gives_the_same_score(scored: str, folder: Path, tokenized: Experiment) -> None:
    own = tokenized.run("python", "-m", "stages", str(folder)).stdout
    assert _score(own) == _score(scored)


def test_the_shipped_program_tells_of_a_damaged_model_in_one_line(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "model.bin").write_bytes(b"no model")
    done = subprocess.run(
        [sys.executable, "-I", "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: model.bin: not a Fairway model file\n"


def test_without_a_model_the_shipped_program_makes_one_first(
    scored: str, folder: Path, tokenized: Experiment, tmp_path: Path
) -> None:
    for path in (tokenized.folder / "artifacts/tokens").iterdir():
        shutil.copy(path, tmp_path)
    program = (folder / "train_gpt.py").read_bytes()
    first = _run_alone(program, tmp_path)
    made = (tmp_path / "model.bin").read_bytes()
    assert _score(first) < _score(scored) - 0.1
    assert _score(_run_alone(program, tmp_path)) == _score(first)
    assert (tmp_path / "model.bin").read_bytes() == made


def test_without_a_model_or_tokens_one_line_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "train_gpt.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: .: no val_*.bin")
