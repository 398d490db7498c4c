"""All modules of a program as one text: imports among them resolved, every module-level name made unique."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fairway.packing.names import GlobalNames, bound_names


@dataclass
class Linked:
    """One text, and what became of the module-level names: {(module, name): new name}."""

    tree: ast.Module
    names: dict[tuple[str, str], str]


@dataclass
class _Module:
    """What a module's names mean: another's new name, or a module of the program (`None` in front of its name)."""

    statements: list[ast.stmt]
    meaning: dict[str, str | tuple[None, str]] = field(default_factory=dict)


def link(root: Path, *entries: str) -> Linked:
    """These modules under `root` and every module of `root` that they need, as one text.

    Modules imported inside functions alone run at the start of the program as well, if what they import is installed:
    Triton's kernels are the case in point. Raises ValueError on an import that this cannot express.
    """
    linker = Linker(root)
    eager = linker.closure(list(entries))
    lazy = linker.closure(list(linker.inner_imports(eager)), eager)
    tree = ast.Module([statement for name in eager for statement in linker.text(name)], [])
    late = [statement for name in lazy for statement in linker.text(name)]
    if late:
        failed = ast.ExceptHandler(ast.Name("ImportError", ast.Load()), None, [ast.Pass()])
        tree.body.append(ast.Try(late, [failed], [], []))
    return Linked(ast.fix_missing_locations(tree), linker.names)


class Linker:
    """The modules of a program: what they import, and their texts for one namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, _Module] = {}
        self.names: dict[tuple[str, str], str] = {}
        # New names of imports from outside, by the text of the import.
        self.imports: dict[str, str] = {}

    def module(self, name: str) -> _Module:
        """The module, read once."""
        if name not in self.modules:
            path = _module_file(self.root, name)
            text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
            body = _without_quotes(ast.parse(text, name)).body
            self.modules[name] = _Module([statement for statement in body if not _is_main_guard(statement)])
        return self.modules[name]

    def closure(self, wanted: list[str], done: list[str] | None = None) -> list[str]:
        """These modules and all they import at module level, in the order in which they run, less those `done`."""
        order: list[str] = list(done or [])
        under_way: set[str] = set(order)

        def visit(name: str) -> None:
            if name in under_way or not self.is_ours(name):
                return
            under_way.add(name)
            for other in [*_parents(name), *self.imported(self.module(name).statements)]:
                visit(other)
            order.append(name)

        for name in wanted:
            visit(name)
        return order[len(done or []) :]

    def is_ours(self, name: str) -> bool:
        """Whether this is a module under the root."""
        return _module_file(self.root, name) is not None

    def imported(self, statements: list[ast.stmt]) -> Iterator[str]:
        """Modules of the program that these statements import themselves."""
        for statement in statements:
            if isinstance(statement, ast.Import):
                yield from (alias.name for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                yield statement.module
                yield from (f"{statement.module}.{alias.name}" for alias in statement.names)

    def inner_imports(self, names: list[str]) -> Iterator[str]:
        """Modules of the program that functions of these modules import."""
        for name in names:
            for statement in self.module(name).statements:
                inside = [node for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement]
                yield from (other for other in self.imported(inside) if self.is_ours(other))

    def text(self, name: str) -> list[ast.stmt]:
        """The module's statements with every module-level name replaced; modules it imports must come before."""
        module = self.module(name)
        kept: list[ast.stmt] = []
        for own in sorted(
            bound_names([s for s in module.statements if not isinstance(s, ast.Import | ast.ImportFrom)])
        ):
            module.meaning[own] = self._new(name, own)
        for statement in module.statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                kept += self._import(statement, module)
            else:
                kept.append(statement)
        replace = _Replace(self, module)
        return [new for statement in kept for new in _listed(replace.visit(statement))]

    def _new(self, module: str, name: str) -> str:
        return self.names.setdefault((module, name), f"{name}__{len(self.names)}")

    def _import(self, statement: ast.Import | ast.ImportFrom, module: _Module) -> list[ast.stmt]:
        """Note what the names mean; the statements that are left: imports from outside that are new."""
        left: list[ast.stmt] = []
        for alias in statement.names:
            bound = alias.asname or alias.name
            source = f"{statement.module}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.name
            ours = self.meaning(source)
            if ours:
                module.meaning[bound] = ours
            elif isinstance(statement, ast.Import) and "." in bound:
                raise ValueError(f"import {alias.name}: give it a name with `as`")
            else:
                new = self.imports.get(ast.unparse(_alone(statement, alias)))
                if new is None:
                    new = f"{bound}__{len(self.imports)}i"
                    self.imports[ast.unparse(_alone(statement, alias))] = new
                    left.append(_alone(statement, ast.alias(alias.name, bound)))
                module.meaning[bound] = new
        return left

    def meaning(self, source: str) -> str | tuple[None, str] | None:
        """What a dotted name of the program means; None of anybody else's."""
        if self.is_ours(source):
            return None, source
        module, _, name = source.rpartition(".")
        if not module or not self.is_ours(module):
            return None
        return self.module(module).meaning.get(name) or self._new(module, name)


class _Replace(GlobalNames):
    """Puts the meaning of a module's names in their place."""

    def __init__(self, linker: Linker, module: _Module) -> None:
        super().__init__(self._new)
        self.linker, self.module = linker, module

    def _new(self, name: str) -> str:
        meaning = self.module.meaning.get(name, name)
        if isinstance(meaning, tuple):
            raise ValueError(f"{meaning[1]}: a module is used as a value")
        return meaning

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`module.name` of a module of the program is a name of the program."""
        if isinstance(node.value, ast.Name) and self._name_of_module(node.value.id):
            meaning = self.linker.meaning(f"{self._name_of_module(node.value.id)}.{node.attr}")
            assert isinstance(meaning, str), f"{ast.unparse(node)} is no name of the program"
            return ast.Name(meaning, node.ctx)
        return self.generic_visit(node)

    def _name_of_module(self, name: str) -> str | None:
        if name in self.class_body or any(name in names for names in self.functions):
            return None
        meaning = self.module.meaning.get(name)
        return meaning[1] if isinstance(meaning, tuple) else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        """Inside functions; what comes from the program becomes a local name for it."""
        ours = [alias for alias in node.names if node.module and self.linker.meaning(f"{node.module}.{alias.name}")]
        if not ours:
            return self.generic_visit(node)
        values = [self.linker.meaning(f"{node.module}.{alias.name}") for alias in ours]
        return [
            ast.Assign([ast.Name(self._name(alias.asname or alias.name), ast.Store())], ast.Name(value, ast.Load()))
            for alias, value in zip(ours, values, strict=True)
            if isinstance(value, str)
        ]


def _without_quotes(tree: ast.Module) -> ast.Module:
    """Annotations that are strings become what the strings say."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                setattr(node, name, ast.parse(annotation.value, mode="eval").body)
    return tree


def _alone(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    """The import of one name."""
    if isinstance(statement, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(statement.module, [alias], 0)


def _listed(new: ast.stmt | list[ast.stmt]) -> list[ast.stmt]:
    return new if isinstance(new, list) else [new]


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _module_file(root: Path, name: str) -> Path | None:
    """The file of a module of `root`; the folder of a package without __init__.py; None for anybody else's module."""
    path = root / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if path.is_dir():
        return path / "__init__.py" if (path / "__init__.py").is_file() else path
    return None
