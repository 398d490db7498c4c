"""Mark and sweep: what stays of a program are the statements that its start reaches by name, or that do something.

A statement at module level is dropped only if nothing that stays mentions a name that it binds, and if all that running
it does is to bind these names (see Quiet). Classes stay or fall whole: names of methods may be made at run time.
"""

import ast
import builtins
import re
from collections.abc import Collection
from dataclasses import dataclass

from fairway.packing.link import Linked
from fairway.packing.names import bound_names, global_names, imported_names

# Packages whose functions, decorators and bases give back what they make and leave all else as it was; and builtins.
QUIET_PACKAGES = {
    *("abc", "collections", "contextlib", "dataclasses", "enum", "pathlib", "pydantic", "re", "struct", "types"),
    *("functools.cache", "functools.lru_cache", "functools.partial", "torch.Tensor", "torch.autograd", "torch.device"),
    *("torch.enable_grad", "torch.nn", "torch.no_grad", "triton", "typing"),
}
QUIET_BUILTINS = {
    *("classmethod", "dict", "float", "frozenset", "int", "len", "list", "object", "property", "range", "set"),
    *("staticmethod", "str", "tuple"),
    *(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)),
}
# Builtins and attributes with which a program finds its own text, names or annotations: packing changes them.
OWN_BUILTINS = {"__file__", "__import__", "__name__", "eval", "exec", "globals", "locals"}
OWN_ATTRIBUTES = {"__annotations__", "__module__", "__name__", "__qualname__", "get_annotations", "get_type_hints"}
IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError"}
# An attribute that is private to a class bears the name of the class.
PRIVATE = re.compile(r"__\w*(?<!__)$")


@dataclass(frozen=True)
class _Part:
    """A statement, the module-level names that it binds and mentions, and whether it only binds its own."""

    statement: ast.stmt
    bound: set[str]
    mentioned: set[str]
    quiet: bool


class Parts:
    """The statements of a linked text, and which of them some names reach."""

    def __init__(self, linked: Linked) -> None:
        self.tree, self.late = linked.tree, linked.late
        statements = [statement for statement in self.tree.body if statement not in self.late]
        statements += [statement for block in self.late for statement in block.body]
        quiet = Quiet(self.tree, linked.unmentioned)
        self.parts = [_Part(s, bound_names([s]), global_names(s), quiet.statement(s)) for s in statements]

    def reached(self, names: set[str]) -> list[ast.stmt]:
        """Statements that bind one of the names or what reached statements mention, and those that are not quiet."""
        waiting, live, found = self.parts, names, list[ast.stmt]()
        while new := [part for part in waiting if not part.quiet or part.bound & live]:
            waiting = [part for part in waiting if part.quiet and not part.bound & live]
            live = live.union(*(part.mentioned for part in new))
            found += [part.statement for part in new]
        return found

    def sweep(self, names: set[str]) -> None:
        """Drop from the text what the names do not reach.

        Raises ValueError if what stays looks at its own text, names or annotations, or if it catches an ImportError
        where a module that is imported inside a function may be missing: using that then is a NameError.
        """
        kept = {id(statement) for statement in self.reached(names)}
        for block in self.late:
            block.body = [statement for statement in block.body if id(statement) in kept]
        kept |= {id(block) for block in self.late if block.body}
        self.tree.body = [statement for statement in self.tree.body if id(statement) in kept]
        _check_self_regard(self.tree)
        mentioned = {name for part in self.parts if id(part.statement) in kept for name in part.mentioned}
        if any(block.body for block in self.late) and mentioned & IMPORT_ERRORS:
            raise ValueError("the program catches ImportError, and imports modules of its own inside functions")


class Quiet:
    """Tells which statements at module level do nothing but bind names, as far as that is certain.

    Those are imports that somebody uses, functions, classes and assignments, if what they call at once (decorators,
    bases, defaults, values) is listed above. Classes that say what happens when others are derived from them are not
    quiet, nor are those others.
    """

    def __init__(self, tree: ast.Module, unmentioned: Collection[str] = ()) -> None:
        """`unmentioned`: names of imports for nobody's use, which are there for what importing does."""
        self.unmentioned, self.origins = unmentioned, imported_names(tree)
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def statement(self, node: ast.stmt) -> bool:
        """Whether it only binds names."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            return not bound_names([node]) & set(self.unmentioned)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            return all(map(self.decorator, node.decorator_list)) and all(map(self.value, defaults))
        if isinstance(node, ast.ClassDef):
            return self._class(node)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = ast.Name | ast.Tuple | ast.expr_context
            plain = all(isinstance(part, names) for target in targets for part in ast.walk(target))
            return plain and self.value(node.value)
        return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))

    def _class(self, node: ast.ClassDef) -> bool:
        hooks = {"__init_subclass__", "__class_getitem__"} & bound_names(node.body)
        quiet = not node.keywords and not hooks and all(map(self.decorator, node.decorator_list))
        return quiet and all(map(self._base, node.bases)) and all(map(self.statement, node.body))

    def _base(self, node: ast.expr) -> bool:
        node = node.value if isinstance(node, ast.Subscript) else node
        if isinstance(node, ast.Name) and node.id in self.classes:
            return self._class(self.classes[node.id])
        return self.is_known(node)

    def decorator(self, node: ast.expr) -> bool:
        """Whether a decorator, with its arguments, is quiet."""
        return self.value(node) if isinstance(node, ast.Call) else self.is_known(node)

    def decorator_name(self, node: ast.expr) -> str:
        """The dotted name of a decorator from outside the program."""
        return self.origin(node.func if isinstance(node, ast.Call) else node)

    def value(self, node: ast.expr | None) -> bool:
        """Whether working out an expression changes nothing. What a lambda does, it does later."""
        if node is None:
            return True
        if isinstance(node, ast.Lambda):
            return all(map(self.value, [*node.args.defaults, *node.args.kw_defaults]))
        if isinstance(node, ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr):
            return False
        if isinstance(node, ast.Call) and not self.is_known(node.func):
            return False
        return all(map(self.value, ast.iter_child_nodes(node)))  # type: ignore[arg-type]

    def is_known(self, node: ast.expr) -> bool:
        """Whether this names something that is quiet."""
        if isinstance(node, ast.Name) and node.id in QUIET_BUILTINS:
            return True
        parts = self.origin(node).split(".")
        return any(".".join(parts[:end]) in QUIET_PACKAGES for end in range(1, len(parts) + 1))

    def origin(self, node: ast.expr) -> str:
        """The dotted name that something has outside the program; empty if it is no such name."""
        if isinstance(node, ast.Attribute):
            return f"{self.origin(node.value)}.{node.attr}"
        return self.origins.get(node.id, "") if isinstance(node, ast.Name) else ""


def _check_self_regard(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if _regards_itself(node):
            raise ValueError(f"the program looks at its own text, names or annotations: {ast.unparse(node)}")


def _regards_itself(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in OWN_BUILTINS
    if isinstance(node, ast.Attribute):
        return node.attr in OWN_ATTRIBUTES or bool(PRIVATE.match(node.attr))
    if isinstance(node, ast.alias):
        return node.name in OWN_ATTRIBUTES
    if isinstance(node, ast.Call):
        return not node.args and getattr(node.func, "id", "") in ("dir", "vars")
    # An annotation in quotes is looked up by name.
    annotations = getattr(node, "annotation", None), getattr(node, "returns", None)
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in annotations)
