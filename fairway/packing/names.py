"""Which names of a Python text mean something at module level, by the scope rules of the language."""

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class GlobalNames(ast.NodeTransformer):
    """Replaces every module-level name by what `rename` makes of it; names local to a function or class stay."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename
        # Names bound by the functions around, and by the class whose body this is.
        self.functions: list[set[str]] = []
        self.class_body: set[str] = set()

    def _name(self, name: str) -> str:
        local = name in self.class_body or any(name in names for names in self.functions)
        return name if local else self.rename(name)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A name that is read, set or deleted."""
        node.id = self._name(node.id)
        return node

    def visit_Global(self, node: ast.Global) -> ast.AST:
        """Names that a function takes from the module."""
        node.names = [self.rename(name) for name in node.names]
        return node

    def visit_alias(self, node: ast.alias) -> ast.AST:
        """A name that an import binds."""
        bound = node.asname or node.name.split(".")[0]
        new = self._name(bound)
        if new != bound:
            node.asname = new
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        """The name of a caught exception."""
        node.name = node.name and self._name(node.name)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Decorators, defaults and annotations are read outside, the body inside."""
        node.name = self._name(node.name)
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.returns = node.returns and self.visit(node.returns)
        self._function(node, parameters(node.args), node.body)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        """A function of one expression."""
        self._function(node, parameters(node.args), [node.body])
        return node

    def _function(self, node: Any, arguments: list[ast.arg], body: list[Any]) -> None:
        args = node.args
        for argument in arguments:
            argument.annotation = argument.annotation and self.visit(argument.annotation)
        args.defaults = [self.visit(default) for default in args.defaults]
        args.kw_defaults = [default and self.visit(default) for default in args.kw_defaults]
        names = {argument.arg for argument in arguments} | bound_names(body)
        new = self._inside(names - declared(body, ast.Global), body)
        node.body = new if isinstance(node.body, list) else new[0]

    def _inside(self, names: set[str], body: Iterable[Any]) -> list[Any]:
        class_body, self.class_body = self.class_body, set()
        self.functions.append(names)
        visited = [self.visit(part) for part in body]
        # One statement may become several.
        new = [part for parts in visited for part in (parts if isinstance(parts, list) else [parts])]
        self.functions.pop()
        self.class_body = class_body
        return new

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Names bound in a class body are seen by the body alone, not by its methods."""
        node.name = self._name(node.name)
        for part in ("bases", "keywords", "decorator_list"):
            setattr(node, part, [self.visit(child) for child in getattr(node, part)])
        outer, self.class_body = self.class_body, bound_names(node.body)
        node.body = [self.visit(part) for part in node.body]
        self.class_body = outer
        return node

    def _comprehension(self, node: Any) -> ast.AST:
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        targets = bound_names([generator.target for generator in node.generators])
        parts: list[tuple[Any, str]] = [(g, name) for g in node.generators for name in ("target", "iter", "ifs")]
        parts += [(node, name) for name in ("elt", "key", "value") if hasattr(node, name)]
        # The first iterable was visited outside.
        for owner, name in parts:
            value = getattr(owner, name)
            if (owner, name) == (first, "iter"):
                continue
            new = self._inside(targets, value if isinstance(value, list) else [value])
            setattr(owner, name, new if isinstance(value, list) else new[0])
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """All parameters of a function."""
    stars = [star for star in (arguments.vararg, arguments.kwarg) if star]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *stars]


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what belongs to its scope, in order; of functions and classes inside only the definition itself."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, SCOPES):
            continue
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, COMPREHENSIONS):
            # Only `:=` reaches out of a comprehension.
            inside = (part for child in children for part in ast.walk(child))
            children = [part.target for part in inside if isinstance(part, ast.NamedExpr)]
        waiting += reversed(children)


def scope_nodes(body: Iterable[ast.AST]) -> list[ast.AST]:
    """Every node that belongs to the scope of these statements, in order."""
    return [node for part in body for node in own_nodes(part)]


def bound_names(body: Iterable[ast.AST]) -> set[str]:
    """Names that these statements or targets bind in their own scope."""
    return {name for node in scope_nodes(body) for name in binds(node)}


def declared(body: Iterable[ast.AST], kind: type[ast.Global] | type[ast.Nonlocal]) -> set[str]:
    """Names of the `global` or `nonlocal` statements of a scope."""
    return {name for node in scope_nodes(body) if isinstance(node, kind) for name in node.names}


def global_names(node: ast.AST) -> set[str]:
    """The module-level names that a statement mentions, bound or read."""
    found: set[str] = set()

    def note(name: str) -> str:
        found.add(name)
        return name

    GlobalNames(note).visit(node)
    return found


def is_harmless(value: ast.expr) -> bool:
    """Whether leaving it out changes nothing: it calls nobody. What a lambda calls, it calls later."""
    quiet = (ast.Name, ast.Attribute, ast.Constant, ast.expr_context, ast.UnaryOp, ast.unaryop, ast.Tuple, ast.List)
    if isinstance(value, ast.Lambda):
        return all(map(is_harmless, filter(None, [*value.args.defaults, *value.args.kw_defaults])))
    return all(isinstance(node, quiet) for node in ast.walk(value))


def is_late(statement: ast.stmt) -> bool:
    """Whether this is a block of statements that run if what they import is there."""
    handlers = statement.handlers if isinstance(statement, ast.Try) else []
    return [ast.unparse(handler) for handler in handlers] == ["except ImportError:\n    pass"]


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of the module, and of its blocks that may fail."""
    for statement in tree.body:
        if isinstance(statement, ast.Try) and is_late(statement):
            yield from statement.body
        else:
            yield statement


def clone(node: Any) -> Any:
    """A deep copy of a node, or of a list of them. copy.deepcopy would follow what others have tied to ast.Load()."""
    if isinstance(node, list):
        return [clone(part) for part in node]
    if not isinstance(node, ast.AST) or not node._fields:
        return node
    return type(node)(**{name: clone(getattr(node, name, None)) for name in node._fields})


def binds(node: ast.AST) -> list[str]:
    """Names that this very node binds."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [node.asname or node.name.split(".")[0]]
    name = getattr(node, "rest" if isinstance(node, ast.MatchMapping) else "name", None)
    return (
        [name] if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping) and name else []
    )
