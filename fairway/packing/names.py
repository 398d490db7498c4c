"""Which names in a Python text are those of its module, by the scope rules of the language."""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class _Scope:
    """The names of one function: its local names, and those that it declares as `global`."""

    local: set[str]
    of_module: set[str] = field(default_factory=set)


class GlobalNames(ast.NodeTransformer):
    """Replaces every module-level name by what `rename` makes of it. Names local to a function or class stay."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename
        # The functions around the node that is being visited, the innermost last, and the names that a class around
        # it binds.
        self.functions: list[_Scope] = []
        self.class_body: set[str] = set()

    def is_local(self, name: str) -> bool:
        """Whether a name at the node that is being visited belongs to a function or class around it."""
        if name in self.class_body:
            return True
        for scope in reversed(self.functions):
            if name in scope.of_module:
                return False
            if name in scope.local:
                return True
        return False

    def _name(self, name: str) -> str:
        return name if self.is_local(name) else self.rename(name)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace a name that is read, set or deleted."""
        node.id = self._name(node.id)
        return node

    def visit_Global(self, node: ast.Global) -> ast.AST:
        """Replace the names that a function declares as the module's."""
        node.names = [self.rename(name) for name in node.names]
        return node

    def visit_alias(self, node: ast.alias) -> ast.AST:
        """Replace the name that an import binds. Raises ValueError for a dotted import: it can bind no other name."""
        bound = node.asname or node.name.split(".")[0]
        new = self._name(bound)
        if new != bound:
            if "." in node.name and not node.asname:
                raise ValueError(f"import {node.name}: give it a name with `as`")
            node.asname = new
        return node

    def _named(self, node: Any) -> ast.AST:
        node.name = node.name and self._name(node.name)
        return self.generic_visit(node)

    # The name of a caught exception, and names that patterns of `match` bind.
    visit_ExceptHandler = visit_MatchAs = visit_MatchStar = _named

    def visit_MatchMapping(self, node: ast.MatchMapping) -> ast.AST:
        """Replace the name that a pattern binds to the rest of a mapping."""
        node.rest = node.rest and self._name(node.rest)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        """Visit decorators, defaults and annotations as outside the function, and its body as inside."""
        node.name = self._name(node.name)
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.returns = node.returns and self.visit(node.returns)
        self._function(node, node.body)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        """Visit a function that consists of one expression."""
        self._function(node, [node.body])
        return node

    def _function(self, node: Any, body: list[Any]) -> None:
        args, arguments = node.args, parameters(node.args)
        for argument in arguments:
            argument.annotation = argument.annotation and self.visit(argument.annotation)
        args.defaults = [self.visit(default) for default in args.defaults]
        args.kw_defaults = [default and self.visit(default) for default in args.kw_defaults]
        of_module = declared_global(body)
        names = {argument.arg for argument in arguments} | bound_names(body)
        new = self._inside(_Scope(names - of_module, of_module), body)
        node.body = new if isinstance(node.body, list) else new[0]

    def _inside(self, scope: _Scope, body: Iterable[Any]) -> list[Any]:
        class_body, self.class_body = self.class_body, set()
        self.functions.append(scope)
        visited = [self.visit(part) for part in body]
        # One statement may become several.
        new = [part for parts in visited for part in (parts if isinstance(parts, list) else [parts])]
        self.functions.pop()
        self.class_body = class_body
        return new

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Visit a class. Only its body sees the names that the body binds; its methods do not."""
        node.name = self._name(node.name)
        for part in ("bases", "keywords", "decorator_list"):
            setattr(node, part, [self.visit(child) for child in getattr(node, part)])
        outer, self.class_body = self.class_body, bound_names(node.body) - declared_global(node.body)
        node.body = [self.visit(part) for part in node.body]
        self.class_body = outer
        return node

    def _comprehension(self, node: Any) -> ast.AST:
        first = node.generators[0]
        # The first iterable is evaluated outside the comprehension, and everything else inside.
        first.iter = self.visit(first.iter)
        scope = _Scope(bound_names([generator.target for generator in node.generators]))
        parts: list[tuple[Any, str]] = [(g, name) for g in node.generators for name in ("target", "iter", "ifs")]
        parts += [(node, name) for name in ("elt", "key", "value") if hasattr(node, name)]
        for owner, name in parts:
            if (owner, name) == (first, "iter"):
                continue
            value = getattr(owner, name)
            new = self._inside(scope, value if isinstance(value, list) else [value])
            setattr(owner, name, new if isinstance(value, list) else new[0])
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """All parameters of a function."""
    stars = [star for star in (arguments.vararg, arguments.kwarg) if star]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *stars]


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all nodes of its scope, in order. Of a function or class in it, that is only the definition."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, SCOPES):
            continue
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, COMPREHENSIONS):
            # Of the names that a comprehension binds, only those of `:=` belong to the scope around it.
            inside = (part for child in children for part in ast.walk(child))
            children = [part.target for part in inside if isinstance(part, ast.NamedExpr)]
        waiting += reversed(children)


def scope_nodes(body: Iterable[ast.AST]) -> list[ast.AST]:
    """Every node that belongs to the scope of these statements, in order."""
    return [node for part in body for node in own_nodes(part)]


def bound_names(body: Iterable[ast.AST]) -> set[str]:
    """Names that these statements or targets bind in the scope that they stand in."""
    return {name for node in scope_nodes(body) for name in binds(node)}


def declared_global(body: Iterable[ast.AST]) -> set[str]:
    """Names in the `global` statements of a scope."""
    return {name for node in scope_nodes(body) if isinstance(node, ast.Global) for name in node.names}


def global_names(node: ast.AST) -> set[str]:
    """The module-level names that a statement mentions, bound or read."""
    found: set[str] = set()

    def note(name: str) -> str:
        found.add(name)
        return name

    GlobalNames(note).visit(node)
    return found


def binds(node: ast.AST) -> list[str]:
    """Names that this node itself binds, without those of the nodes in it."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [node.asname or node.name.split(".")[0]]
    name = getattr(node, "rest" if isinstance(node, ast.MatchMapping) else "name", None)
    patterns = ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping
    return [name] if isinstance(node, patterns) and name else []


def imported_names(tree: ast.Module) -> dict[str, str]:
    """The names that imports bind at module level, each with the dotted name of what is imported."""
    imports = [node for node in scope_nodes(tree.body) if isinstance(node, ast.Import | ast.ImportFrom)]
    of = {id(node): f"{node.module}." if isinstance(node, ast.ImportFrom) else "" for node in imports}
    return {binds(alias)[0]: of[id(node)] + alias.name for node in imports for alias in node.names}
