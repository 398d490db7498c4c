"""requirements.txt of a submission: the packages that the shipped program imports, as installed here."""

import ast
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

from stages.compress.bundle import quoted
from stages.compress.program.link import link


def requirements(root: Path, entry: str) -> str:
    """Lines `package==version` for `entry` (a module under `root`) and every module of `root` that it imports,
    and for the stub that unpacks them.

    Packages that are imported if they are there, and are not, are left out.
    """
    distributions = packages_distributions()
    unpacking = _imported(ast.parse(quoted(b"")))
    packages = {name for top in outside_imports(root, entry) | unpacking for name in distributions.get(top, [])}
    # Without a build's own suffix (2.13.0+cpu), which no index knows.
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in sorted(packages, key=str.lower))


def outside_imports(root: Path, entry: str) -> set[str]:
    """Top-level names of the imported modules that are neither under `root` nor Python's own."""
    return _imported(link(root, entry).tree)


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names that import statements anywhere in the text name, but for Python's own."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names
