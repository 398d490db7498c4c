"""Imports modules from memory. This source travels inside train_gpt.py and must stand alone."""

import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType


class MemoryImporter(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of {name: source}; whatever has modules below it is a package.

    Code gets a file name of its own and its source can be asked for: tracebacks, inspect and torch.compile need both.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for a module held here, else None."""
        if name not in self.sources:
            return None
        return spec_from_loader(name, self, origin=self._file(name), is_package=self.is_package(name))

    def is_package(self, name: str) -> bool:
        """Whether other modules lie below this one."""
        return any(other.startswith(name + ".") for other in self.sources)

    def get_source(self, name: str) -> str:
        """The source as it was packed."""
        return self.sources[name]

    def get_code(self, name: str) -> CodeType:
        """The source compiled under its file name."""
        return compile(self.sources[name], self._file(name), "exec")

    def _file(self, name: str) -> str:
        return f"train_gpt/{name.replace('.', '/')}.py"


def install(sources: dict[str, str]) -> None:
    """Make the modules importable, ahead of anything else of their name."""
    sys.meta_path.insert(0, MemoryImporter(sources))
