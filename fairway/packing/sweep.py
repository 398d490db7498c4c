"""Mark and sweep: statements at module level, and methods, that the entries of a program reach by name."""

import ast
from collections.abc import Iterator
from typing import Any

from fairway.packing.names import bound_names, clone, global_names, is_late, statements
from fairway.packing.strip import Plain, Strip

WRAPPERS = ("property", "classmethod", "staticmethod", "abstractmethod")


class Sweep:
    """What is reached. `live`: names of the module level; `attributes`: what stands behind a dot or in quotes."""

    def __init__(self, tree: ast.Module, entries: set[str], typed: set[str]) -> None:
        self.tree, self.typed = tree, typed
        self.live, self.attributes, self.made = set(entries), set[str](), set(entries)
        self.statements = list(statements(tree))
        self.own = {name for statement in self.statements for name in bound_names([statement])}
        self.classes = {s.name: s for s in self.statements if isinstance(s, ast.ClassDef)}
        self.inherited = _inherited(tree, self.classes)
        self._parts = {id(s): clone(_parts(s)) for s in self.statements}
        self._bound = {id(s): bound_names([s]) for s in self.statements}
        self._mark()

    def _mark(self) -> None:
        seen: set[int] = set()
        while True:
            new = [
                part
                for s in self.statements
                if self._is_live(s)
                for part in self._live_parts(s)
                if id(part) not in seen
            ]
            if not new:
                return
            for part in new:
                seen.add(id(part))
                for found, kind in zip((self.live, self.attributes, self.made), self._mentioned(part), strict=True):
                    found |= kind

    def _is_live(self, statement: ast.stmt) -> bool:
        owner = _acts_on(statement)
        if owner is not None and owner in self.own:
            return owner in self.live
        if isinstance(statement, ast.Expr):
            return not isinstance(statement.value, ast.Constant)
        bound = self._bound[id(statement)]
        return not bound or bool(bound & self.live)

    def _live_parts(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        for original, part in zip(_parts(statement), self._parts[id(statement)], strict=True):
            if original is statement or self._is_live_member(statement, original):
                yield part

    def _is_live_member(self, owner: ast.stmt, member: ast.stmt) -> bool:
        if not isinstance(member, ast.FunctionDef) or not isinstance(owner, ast.ClassDef):
            return True
        wrapped = any(ast.unparse(d).split("__")[0] not in WRAPPERS for d in member.decorator_list)
        name = member.name
        return wrapped or name.startswith("__") or name in self.attributes or self.inherited(owner.name, name)

    def _mentioned(self, part: ast.stmt) -> tuple[set[str], set[str], set[str]]:
        """Names, attributes and quoted words, and names that are more than the second argument of isinstance."""
        bare = Plain().visit(Strip(self.typed).visit(part) or ast.Pass())
        quoted = {n.value for n in ast.walk(bare) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        attributes = {n.attr for n in ast.walk(bare) if isinstance(n, ast.Attribute)} | quoted
        for node in ast.walk(bare):
            if isinstance(node, ast.MatchClass):
                attributes |= set(node.kwd_attrs)
        names = global_names(bare) & self.own
        if not any(isinstance(node, ast.Name) and node.id == "isinstance" for node in ast.walk(bare)):
            return names, attributes, names - {getattr(bare, "name", "")}
        return names, attributes, global_names(_NoTests().visit(bare)) & self.own

    def sweep(self) -> bool:
        """Drop what is not reached; whether there was anything."""
        before = sum(1 for _ in ast.walk(self.tree))
        self.tree.body = self._kept(self.tree.body)
        return sum(1 for _ in ast.walk(self.tree)) < before

    def _kept(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        kept: list[ast.stmt] = []
        for statement in statements:
            if is_late(statement):
                assert isinstance(statement, ast.Try)
                statement.body = self._kept(statement.body)
                kept += [statement] if statement.body else []
                continue
            if not self._is_live(statement):
                continue
            if isinstance(statement, ast.ClassDef):
                members = [part for part in statement.body if self._is_live_member(statement, part)]
                statement.body = members or [ast.Pass()]
            kept.append(statement)
        return kept


class _NoTests(ast.NodeTransformer):
    """Without the classes that isinstance asks for: asking makes no object."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            node.args = node.args[:1]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.name = "_"
        return node


def _parts(statement: ast.stmt) -> list[ast.stmt]:
    """A class apart from its methods, and each of these; other statements whole."""
    if not isinstance(statement, ast.ClassDef):
        return [statement]
    methods = [part for part in statement.body if isinstance(part, ast.FunctionDef)]
    head = ast.ClassDef(statement.name, statement.bases, statement.keywords, [], statement.decorator_list)
    head.body = [part for part in statement.body if part not in methods] or [ast.Pass()]
    return [head, *methods]


def _acts_on(statement: ast.stmt) -> str | None:
    """`name` of `name.method(...)` and of a function under `@name.method`: it only changes what has that name."""
    node: Any = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
        node = statement.decorator_list[0]
    node = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id
    return None


def _inherited(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> Any:
    """A function: whether a method of a class stands in for one of a base outside the program."""
    outside: dict[str, Any] = {}
    bases = [base for owner in classes.values() for base in owner.bases]
    needed = {node.id for base in bases for node in ast.walk(base) if isinstance(node, ast.Name)}
    for statement in statements(tree):
        if isinstance(statement, ast.Import | ast.ImportFrom) and bound_names([statement]) & needed:
            try:
                exec(ast.unparse(statement), outside)
            except ImportError:
                continue

    def inherited(name: str, method: str) -> bool:
        for base in classes[name].bases:
            if isinstance(base, ast.Name) and base.id in classes:
                if inherited(base.id, method):
                    return True
            elif hasattr(_value(base, outside), method):
                return True
        return False

    return inherited


def _value(base: ast.expr, outside: dict[str, Any]) -> Any:
    """A class from outside; ABC and Protocol may be gone from the imports, since Strip takes them from the bases."""
    try:
        return eval(ast.unparse(base), outside)
    except NameError:
        return None
