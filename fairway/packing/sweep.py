"""Mark and sweep: of a program only those statements stay that its start reaches by name, or that do something.

A statement at module level is dropped only if nothing that stays mentions a name that it binds, and if running it does
nothing but bind these names (see Quiet). A class stays or goes as a whole, because names of methods may be made at run
time.
"""

import ast
import builtins
import re
from collections.abc import Collection
from dataclasses import dataclass

from fairway.packing.link import Linked
from fairway.packing.names import bound_names, global_names, imported_names

# Packages whose functions, decorators and base classes only return what they make and change nothing else, and builtins
# of which the same is true.
QUIET_PACKAGES = {
    *("abc", "collections", "contextlib", "dataclasses", "enum", "pathlib", "pydantic", "re", "struct", "types"),
    *("functools.cache", "functools.lru_cache", "functools.partial", "os.cpu_count", "threading.BoundedSemaphore"),
    *("torch.Tensor", "torch.autograd", "torch.device", "torch.enable_grad", "torch.nn", "torch.no_grad", "triton"),
    "typing",
}
QUIET_BUILTINS = {
    *("classmethod", "dict", "float", "frozenset", "int", "len", "list", "object", "property", "range", "round"),
    *("set", "staticmethod", "str", "tuple"),
    *(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)),
}
# Builtins and attributes with which a program reads its own text, names or annotations, all of which packing changes.
OWN_BUILTINS = {"__file__", "__import__", "__name__", "eval", "exec", "globals", "locals"}
OWN_ATTRIBUTES = {"__annotations__", "__module__", "__name__", "__qualname__", "get_annotations", "get_type_hints"}
IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError"}
# Names that are private to a class. Python puts the name of the class in front of them, and packing changes that.
PRIVATE = re.compile(r"__\w*(?<!__)$")


@dataclass(frozen=True)
class _Part:
    """A statement, the module-level names that it binds and mentions, and whether it does nothing but bind them."""

    statement: ast.stmt
    bound: set[str]
    mentioned: set[str]
    quiet: bool


class Parts:
    """The statements of a linked text, which finds out which of them some names reach."""

    def __init__(self, linked: Linked) -> None:
        self.tree, self.late = linked.tree, linked.late
        statements = [statement for statement in self.tree.body if statement not in self.late]
        statements += [statement for block in self.late for statement in block.body]
        quiet = Quiet(self.tree, linked.unmentioned)
        self.parts = [_Part(s, bound_names([s]), global_names(s), quiet.statement(s)) for s in statements]

    def reached(self, names: set[str]) -> list[ast.stmt]:
        """The statements that stay.

        They are those that are not quiet, and those that bind one of the names or a name that a statement mentions that
        stays.
        """
        waiting, live, found = self.parts, names, list[ast.stmt]()
        while new := [part for part in waiting if not part.quiet or part.bound & live]:
            waiting = [part for part in waiting if part.quiet and not part.bound & live]
            live = live.union(*(part.mentioned for part in new))
            found += [part.statement for part in new]
        return found

    def sweep(self, names: set[str]) -> None:
        """Drop from the text whatever the names do not reach.

        Raises ValueError if what stays reads its own text, names or annotations, or if it catches ImportError and also
        imports modules of its own inside functions: if such a module is missing, using it is a NameError instead.
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
    """Tells which statements at module level certainly do nothing but bind names; they are called quiet.

    They are imports that something uses, and functions, classes and assignments of which everything that is called at
    once (decorators, bases, defaults, values) is listed above. A class that has a say when others are derived from it
    is not quiet, and neither are those others.
    """

    def __init__(self, tree: ast.Module, unmentioned: Collection[str] = ()) -> None:
        """`unmentioned` are names of imports that nothing mentions, which are there for what importing itself does."""
        self.unmentioned, self.origins = unmentioned, imported_names(tree)
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def statement(self, node: ast.stmt) -> bool:
        """Whether a statement does nothing but bind names."""
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
        """The dotted name of a decorator; empty if it is the program's own."""
        return self.origin(node.func if isinstance(node, ast.Call) else node)

    def value(self, node: ast.expr | None) -> bool:
        """Whether evaluating an expression changes nothing. The body of a lambda does not count: it runs later."""
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
        """Whether an expression names something that is listed above."""
        if isinstance(node, ast.Name) and node.id in QUIET_BUILTINS:
            return True
        parts = self.origin(node).split(".")
        return any(".".join(parts[:end]) in QUIET_PACKAGES for end in range(1, len(parts) + 1))

    def origin(self, node: ast.expr) -> str:
        """The dotted name of what an expression names outside the program; empty if it names nothing there."""
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
    # An annotation in quotes is a name that is looked up at run time.
    annotations = getattr(node, "annotation", None), getattr(node, "returns", None)
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in annotations)
