"""All modules of a program as one text, in which imports among them are resolved and module-level names are unique.

Python code that would mean something else in one text is refused with a ValueError that names the module (see Linker).
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairway.packing.names import GlobalNames, binds, bound_names, imported_names, own_nodes, parameters

Import = ast.Import | ast.ImportFrom
# What the linker appends to a name to make it unique. No name of the program may end like this.
SUFFIX = re.compile(r"__\d+i?$")


@dataclass
class Linked:
    """The one text of a program, and what later steps need to know of it."""

    tree: ast.Module
    # What the module-level names of each module are called in the text: {(module, name): new name}.
    names: dict[tuple[str, str], str]
    # The blocks at the end of the text. They hold the modules that are imported only inside functions.
    late: list[ast.Try]
    # Names of imports that nothing in the text mentions. Such an import is there for what importing itself does.
    unmentioned: set[str]

    def modules(self) -> list[str]:
        """The modules of which the text, from which statements may have been dropped, still has something."""
        bound = bound_names(self.tree.body)
        return sorted({module for (module, _), name in self.names.items() if name in bound})


# What a name in a module means: a name of the text, or a module of the program, as None and the module's name.
Meaning = str | tuple[None, str]


@dataclass
class _Module:
    """The statements of a module, and what its names mean, which is worked out when it is first needed."""

    statements: list[ast.stmt]
    # Names of the module that its functions set by `global`.
    set_anew: set[str]
    meanings: dict[str, Meaning] | None = None


def link(root: Path, *entries: str) -> Linked:
    """These modules under `root` and every module of `root` that they need, as one text.

    Modules that are imported only inside functions stand at the end of the text, each in a `try` that ends quietly if a
    package is not installed. This is made for Triton's kernels. Raises ValueError on what one text cannot express.
    """
    linker, lazy = Linker(root), list[str]()
    eager = linker.closure(list(entries))
    while new := linker.closure(list(linker.inner_imports([*eager, *lazy])), [*eager, *lazy]):
        lazy += new
    tree = ast.Module([statement for name in eager for statement in linker.text(name, linker.seen)], [])
    late = [_if_installed(linker.text(name, set(linker.seen))) for name in lazy]
    tree.body += late
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return Linked(ast.fix_missing_locations(tree), linker.names, late, set(imported_names(tree)) - names)


def _if_installed(statements: list[ast.stmt]) -> ast.Try:
    """A module that is imported inside functions. If its package is missing, its names stay undefined."""
    errors = ast.Tuple([ast.Name("ImportError", ast.Load()), ast.Name("NameError", ast.Load())], ast.Load())
    return ast.Try(statements or [ast.Pass()], [ast.ExceptHandler(errors, None, [ast.Pass()])], [], [])


class Linker:
    """The modules of a program: what they import, and their statements with names for one namespace.

    It refuses what would mean something else in one text:

    - imports that are relative or starred, of __future__, or of a dotted name without `as`;
    - a name that is imported and also bound in another way;
    - imports among the program's modules that stand after other statements or inside blocks at module level, and
      imports of whole modules inside functions;
    - a module used as a value, or whose names are set from outside;
    - `from` with a name that its module sets by `global`;
    - a class body that reads a global and binds the same name itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, _Module] = {}
        self.names: dict[tuple[str, str], str] = {}
        # The new names of imports from outside, by the text of the import; and the import texts written so far.
        self.imports: dict[str, str] = {}
        self.seen: set[str] = set()

    def module(self, name: str) -> _Module:
        """The module of that name, which is read once."""
        if name not in self.modules:
            path = module_file(self.root, name)
            text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
            body = ast.parse(text, name).body
            statements = [statement for statement in body if not _is_main_guard(statement)]
            self.modules[name] = _Module(statements, _set_anew(statements))
        return self.modules[name]

    def closure(self, wanted: list[str], done: list[str] | None = None) -> list[str]:
        """These modules and all that they import at module level, except those `done`, in the order of running."""
        order: list[str] = list(done or [])
        under_way: set[str] = set(order)

        def visit(name: str) -> None:
            if name in under_way or not self.is_ours(name):
                return
            under_way.add(name)
            for other in [*parents(name), *self.imported(self.module(name).statements)]:
                visit(other)
            order.append(name)

        for name in wanted:
            visit(name)
        return order[len(done or []) :]

    def is_ours(self, name: str) -> bool:
        """Whether this is a module under the root."""
        return module_file(self.root, name) is not None

    def imported(self, statements: list[ast.stmt]) -> Iterator[str]:
        """Names of the modules that these import statements may mean; some of them may be names inside a module."""
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

    def text(self, name: str, seen: set[str]) -> list[ast.stmt]:
        """The module's statements with every module-level name replaced. The modules that it imports must come before.

        `seen` holds the imports from outside that need not be written again. Those of the module are added to it.
        """
        replace = _Replace(self, name)
        kept: list[ast.stmt] = []
        for statement in self.module(name).statements:
            kept += self._from_outside(statement, seen) if isinstance(statement, Import) else [statement]
        return [new for statement in kept for new in _listed(replace.visit(statement))]

    def _from_outside(self, statement: Import, seen: set[str]) -> Iterator[ast.stmt]:
        """The imports from outside the program, one for each name, that have not been written yet."""
        for alias in statement.names:
            text = ast.unparse(_alone(statement, alias))
            if not self.meaning(_source(statement, alias)) and text not in seen:
                seen.add(text)
                yield _alone(statement, ast.alias(alias.name, alias.asname or alias.name))

    def meanings(self, name: str) -> dict[str, Meaning]:
        """What the module-level names of a module mean."""
        module = self.module(name)
        if module.meanings is None:
            _refuse(name, module.statements)
            rest = [statement for statement in module.statements if not isinstance(statement, Import)]
            module.meanings = {own: self._new(name, own) for own in sorted(bound_names(rest) | module.set_anew)}
            if late := [s for s in module.statements[_leading_imports(module.statements) :] if self._is_among_ours(s)]:
                raise ValueError(f"{name}: {ast.unparse(late[0])}: behind other statements")
            for statement in module.statements:
                if isinstance(statement, Import):
                    self._import(name, statement, module.meanings)
        return module.meanings

    def _is_among_ours(self, statement: ast.stmt) -> bool:
        return isinstance(statement, Import) and any(map(self.is_ours, self.imported([statement])))

    def _import(self, module: str, statement: Import, meanings: dict[str, Meaning]) -> None:
        """Add to `meanings` what the names that a statement imports mean."""
        for alias in statement.names:
            bound = alias.asname or alias.name
            if isinstance(statement, ast.Import) and "." in bound:
                raise ValueError(f"{module}: import {alias.name}: give it a name with `as`")
            text = ast.unparse(_alone(statement, alias))
            meaning = self.meaning(_source(statement, alias))
            meaning = meaning or self.imports.setdefault(text, f"{_stem(bound)}__{len(self.imports)}i")
            if meanings.setdefault(bound, meaning) != meaning:
                raise ValueError(f"{module}: {bound} is imported, and bound otherwise too")

    def _new(self, module: str, name: str) -> str:
        return self.names.setdefault((module, name), f"{_stem(name)}__{len(self.names)}")

    def meaning(self, source: str) -> Meaning | None:
        """What a dotted name means if it is the program's; None if it is from outside."""
        if self.is_ours(source):
            return None, source
        module, _, name = source.rpartition(".")
        if not module or not self.is_ours(module):
            return None
        if name in self.module(module).set_anew:
            raise ValueError(f"{source} is set by `global`: import its module instead")
        if name not in self.meanings(module):
            raise ValueError(f"{source}: no such name, or modules import each other in a circle")
        return self.meanings(module)[name]


class _Replace(GlobalNames):
    """Replaces the names of a module by what they mean."""

    def __init__(self, linker: Linker, name: str) -> None:
        super().__init__(self._new)
        self.linker, self.module, self.meanings = linker, name, linker.meanings(name)

    def _new(self, name: str) -> str:
        meaning = self.meanings.get(name, name)
        if isinstance(meaning, tuple):
            raise ValueError(f"{self.module}: {meaning[1]}: a module is used as a value")
        return meaning

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace `module.name`, if that is a module of the program, by the name that it means."""
        of = self.meanings.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if not isinstance(of, tuple) or (isinstance(node.value, ast.Name) and self.is_local(node.value.id)):
            return self.generic_visit(node)
        meaning = self.linker.meanings(of[1]).get(node.attr)
        if not isinstance(meaning, str) or not isinstance(node.ctx, ast.Load):
            raise ValueError(f"{self.module}: {ast.unparse(node)} is no name of the program, or is set from outside")
        return ast.Name(meaning, node.ctx)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Refuse a class body that reads a global and binds the same name: which is meant depends on the order."""
        read = {name.id for name in _read_in_body(node)}
        if clash := sorted(read & bound_names(node.body) & self.meanings.keys()):
            raise ValueError(f"{self.module}: class {node.name} has its own {clash[0]}, and reads the global one")
        return super().visit_ClassDef(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        """Leave an import inside a function or block as it is if it is from outside the program; refuse any other."""
        if any(self.linker.meaning(alias.name) for alias in node.names):
            raise ValueError(f"{self.module}: {ast.unparse(node)}: import names of it, with `from`")
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        """Turn an import from the program inside a function into assignments of local names."""
        values = [self.linker.meaning(f"{node.module}.{alias.name}") for alias in node.names]
        if not any(values):
            return self.generic_visit(node)
        if not self.functions or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.module}: {ast.unparse(node)}: only at the top, or plainly inside a function")
        return [
            ast.Assign(
                [ast.Name(self._name(alias.asname or alias.name), ast.Store())], ast.Name(str(value), ast.Load())
            )
            for alias, value in zip(node.names, values, strict=True)
        ]


def _refuse(name: str, statements: list[ast.stmt]) -> None:
    """Raise ValueError on imports that one text cannot express, and on names like those that the linker makes."""
    for node in (node for statement in statements for node in ast.walk(statement)):
        starred = isinstance(node, Import) and any(alias.name == "*" for alias in node.names)
        relative = isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__")
        if starred or relative or getattr(node, "type_params", None):
            raise ValueError(f"{name}: {ast.unparse(node).splitlines()[0]}: cannot be linked")
        bound = [*binds(node), node.arg] if isinstance(node, ast.arg) else binds(node)
        if taken := [word for word in bound if SUFFIX.search(word)]:
            raise ValueError(f"{name}: {taken[0]}: a name of the linker's own kind")


def _leading_imports(statements: list[ast.stmt]) -> int:
    """How many statements at the start of a module are imports or constants such as its docstring."""
    others = (i for i, s in enumerate(statements) if not isinstance(s, Import) and not _is_constant(s))
    return next(others, len(statements))


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _set_anew(statements: list[ast.stmt]) -> set[str]:
    """Names of the module that its functions declare as `global`."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    return {name for node in nodes if isinstance(node, ast.Global) for name in node.names}


def _read_in_body(node: ast.ClassDef) -> Iterator[ast.Name]:
    """Names that a class body reads when it runs, including those in defaults and decorators of its methods."""
    for part in (part for statement in node.body for part in own_nodes(statement)):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            outside = [*part.decorator_list, *part.args.defaults, *filter(None, part.args.kw_defaults)]
            outside += [argument.annotation for argument in parameters(part.args) if argument.annotation]
            part = ast.Tuple(outside, ast.Load())
        yield from (name for name in ast.walk(part) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load))


def _source(statement: Import, alias: ast.alias) -> str:
    """The dotted name of what a statement imports under an alias."""
    return f"{statement.module}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.name


def _alone(statement: Import, alias: ast.alias) -> ast.stmt:
    """An import statement for this one name."""
    if isinstance(statement, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(statement.module, [alias], 0)


def _listed(new: ast.stmt | list[ast.stmt]) -> list[ast.stmt]:
    return new if isinstance(new, list) else [new]


def _stem(name: str) -> str:
    """The name without leading underscores, which would make it private to any class that uses it."""
    return name.lstrip("_") or "x"


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def parents(name: str) -> list[str]:
    """The packages that a module lies in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def module_file(root: Path, name: str) -> Path | None:
    """The file of a module under `root`, or the folder of a package without __init__.py; None if it is elsewhere."""
    path = root / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if path.is_dir():
        return path / "__init__.py" if (path / "__init__.py").is_file() else path
    return None
