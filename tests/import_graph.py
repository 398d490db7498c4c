"""The import graph of the repository, read from the text of its modules."""

import ast
import re
from functools import cache
from pathlib import Path

from conftest import REPOSITORY

# Every module of the project by its dotted name.
MODULES: dict[str, Path] = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("stages", "fairway")
    for path in sorted((REPOSITORY / top).rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    """The parsed text of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


# The one module that imports others by name: every file of its package that defines an evaluator.
REGISTRY = "fairway.evaluation.registry"
EVALUATORS = {
    name
    for name, path in MODULES.items()
    if name.startswith("fairway.evaluation.") and re.search(r"^class \w+\(Evaluator\):", path.read_text(), re.MULTILINE)
}


@cache
def imports(module: str) -> frozenset[str]:
    """The project's modules that a module imports by itself, at its top or inside a function."""
    found = set(EVALUATORS) if module == REGISTRY else set[str]()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            # `from package import module` reads the module; any other name stands in the named file itself.
            found |= inner if len(inner) == len(node.names) else inner | {node.module} & set(MODULES)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(MODULES)
    return frozenset(found)


def closure(module: str, *, not_through: frozenset[str] = frozenset()) -> set[str]:
    """A module and all that it imports directly or by way of others, except `not_through` and what only they import."""
    found, wanted = set[str](), [module]
    while wanted:
        name = wanted.pop()
        if name not in found and name not in not_through:
            found.add(name)
            wanted += imports(name)
    return found


def package(module: str) -> str:
    """The package of fairway that a module belongs to ("" for stages and for modules directly in fairway)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "fairway" and (REPOSITORY / "fairway" / parts[1]).is_dir() else ""
