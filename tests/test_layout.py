"""The three rules of docs/architecture.md on what may import what, read from the import graph."""

from collections import Counter

import pytest
from conftest import REPOSITORY
from import_graph import MODULES, imports, package

# Packages of fairway in the order in which they may be imported: each by those behind it.
ORDER = (
    "runtime",
    "tokens",
    "model",
    "training",
    "adaptation",
    "codec",
    "quantization",
    "evaluation",
    "decoding",
    "certification",
    "packing",
    "reporting",
)
STAGES = [name for name in MODULES if name.startswith("stages.")]


def test_the_order_names_every_package() -> None:
    folders = {path.parent.name for path in (REPOSITORY / "fairway").glob("*/*.py")}
    assert folders == set(ORDER)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    assert [name for name in imports(stage) if name.startswith("stages")] == []


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_only_packages_before_it(name: str) -> None:
    allowed = {*ORDER[: ORDER.index(name) + 1]}
    of_package = [module for module in MODULES if package(module) == name]
    assert of_package
    arrows = {(module, other) for module in of_package for other in imports(module)}
    assert {arrow for arrow in arrows if package(arrow[1]) not in allowed} == set()


def test_a_file_name_occurs_once() -> None:
    names = Counter(path.name for path in MODULES.values() if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} == set()


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_packages_lead_back_to_nothing() -> None:
    """No circle of imports between modules: every one of them can be read before those that import it."""
    left = {name: set(imports(name)) - {name} for name in MODULES}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert left == {}
