"""What a program never asks for: methods that nothing it runs names, arguments that nobody gives, branches never taken.

The sweep (sweep.py) keeps or drops whole statements at module level. This drops parts of them, such as the resume
points of a loop that the program never hands any. What it drops makes more of the program unreached, so both take turns
until nothing changes (bundle.py).
"""

import ast
import re
from collections.abc import Iterator
from typing import TypeGuard

from fairway.packing.names import own_nodes
from fairway.packing.schema import attributes_read
from fairway.packing.sweep import Quiet

# Bases from outside that call no method of a class which Python itself does not call.
PASSIVE_BASES = {"abc.ABC", "typing.NamedTuple"}
# Functions that read an attribute whose name may be made at run time.
READERS = {"getattr", "hasattr"}


def drop_unasked(tree: ast.Module, call: ast.Call) -> bool:
    """Drop from the text of a program, which `call` starts, what it never asks for; whether there was anything.

    Methods go if no attribute, no string and no f-string of a getattr in what stays can be their name. Only classes are
    looked at whose bases are the program's own or call no methods; an object that is handed to a package from outside
    has to be of another class, or the program has to name the methods that the package calls.
    """
    dropped = _drop_methods(tree, call)
    dropped |= _drop_arguments(tree, call)
    folded = _Fold()
    folded.visit(tree)
    return dropped or folded.changed


def _drop_methods(tree: ast.Module, call: ast.Call) -> bool:
    """Begin with what stands outside of methods, and go on with those that it names, then with those that they name."""
    quiet = Quiet(tree)
    whole = {node: node.body for node in quiet.classes.values() if _is_own(node, quiet)}
    waiting = [part for body in whole.values() for part in body if _is_method(part, quiet)]
    for node, body in whole.items():
        node.body = [part for part in body if part not in waiting]
    names: set[str] = set()
    new: list[ast.AST] = [tree, call]
    while new:
        for part in new:
            names |= {re.escape(name) for name in attributes_read(part)} | set(_made(part))
        asked = re.compile("|".join(names))
        new = [method for method in waiting if asked.fullmatch(method.name)]
        waiting = [method for method in waiting if method not in new]
    for node, body in whole.items():
        node.body = [part for part in body if part not in waiting] or [ast.Pass()]
    return bool(waiting)


def _made(tree: ast.AST) -> Iterator[str]:
    """Patterns of the attribute names that a part of the program puts together itself where it reads them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            made = node.args[1]
            if isinstance(made, ast.JoinedStr):
                yield "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".*" for p in made.values)
            elif isinstance(made, ast.BinOp):
                yield ".*"


def _is_own(node: ast.ClassDef, quiet: Quiet) -> bool:
    """Whether all classes that a class is derived from are the program's, or do nothing with its methods."""
    if node.keywords:
        return False
    own = [quiet.classes.get(getattr(base, "id", "")) for base in node.bases]
    outside = [quiet.origin(base) for base, found in zip(node.bases, own, strict=True) if found is None]
    return PASSIVE_BASES.issuperset(outside) and all(_is_own(base, quiet) for base in own if base is not None)


def _is_method(part: ast.stmt, quiet: Quiet) -> TypeGuard[ast.FunctionDef]:
    """Whether part of a class is a method that only the program can call. Python itself calls those such as __len__."""
    if not isinstance(part, ast.FunctionDef) or part.name.startswith("__"):
        return False
    return all(map(quiet.decorator, part.decorator_list))


def _drop_arguments(tree: ast.Module, call: ast.Call) -> bool:
    """Write the default of a parameter into its function where no call gives it another value.

    That is known of functions of the module that are only ever called, and by calls that spell out their arguments.
    """
    functions = {node.name: node for node in _statements(tree) if isinstance(node, ast.FunctionDef)}
    nodes = [*ast.walk(tree), *ast.walk(call)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    called = {id(node.func) for node in calls}
    valued = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    dropped = False
    for name in sorted(functions.keys() - valued):
        if not functions[name].decorator_list:
            of_it = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == name]
            dropped |= _write_defaults(functions[name], of_it)
    return dropped


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of the module and of its blocks of modules that are imported inside functions."""
    for statement in tree.body:
        yield from statement.body if isinstance(statement, ast.Try) else [statement]


def _write_defaults(function: ast.FunctionDef, calls: list[ast.Call]) -> bool:
    """Do so for each parameter of one function; whether there was any."""
    arguments = function.args
    if any(isinstance(argument, ast.Starred) for call in calls for argument in call.args) or arguments.vararg:
        return False
    given = {keyword.arg for call in calls for keyword in call.keywords}
    most = max((len(call.args) for call in calls), default=0)
    if None in given or arguments.posonlyargs:
        return False
    positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    first = len(arguments.args) - len(positional)
    defaults = [
        (arguments.args, arguments.defaults, parameter, default)
        for place, (parameter, default) in enumerate(zip(positional, arguments.defaults, strict=True), first)
        if place >= most
    ] + [
        (arguments.kwonlyargs, arguments.kw_defaults, parameter, default)
        for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    dropped = False
    for of, values, parameter, default in defaults:
        if isinstance(default, ast.Constant) and parameter.arg not in given and not _is_set(function, parameter.arg):
            of.remove(parameter)
            values.remove(default)
            function.body = [_Write(parameter.arg, default).visit(statement) for statement in function.body]
            dropped = True
    return dropped


def _is_set(function: ast.FunctionDef, name: str) -> bool:
    """Whether anything in a function gives a parameter another value, or a function in it has a name of its own."""
    for node in (node for statement in function.body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.arg) and node.arg == name:
            return True
        if isinstance(node, ast.Nonlocal | ast.ExceptHandler | ast.match_case | ast.Import | ast.ImportFrom):
            return True
    return False


class _Write(ast.NodeTransformer):
    """Writes a constant where a name is read."""

    def __init__(self, name: str, value: ast.Constant) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.value.value) if node.id == self.name else node


class _Fold(ast.NodeTransformer):
    """Works out conditions of constants, and drops what they decide against.

    A branch that holds a `yield` stays, since it makes a generator of its function even if it is never taken.
    """

    changed = False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit the children first; then drop, in each list of statements, those behind its end."""
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                end = next((i for i, s in enumerate(statements, 1) if isinstance(s, ast.Return | ast.Raise)), None)
                if end and statements[end:] and not _yields(statements[end:]):
                    self.changed = True
                    del statements[end:]
                if not statements and field == "body":
                    statements.append(ast.Pass())
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return self._constant(not node.operand.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Work out whether a constant is None."""
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        if len(sides) == 2 and all(isinstance(side, ast.Constant) for side in sides):
            left, right = (side.value for side in sides if isinstance(side, ast.Constant))
            if None in (left, right) and isinstance(node.ops[0], ast.Is | ast.IsNot):
                return self._constant((left is right) == isinstance(node.ops[0], ast.Is))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """Drop constants at the head that do not decide, and what stands behind one that does."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        while len(node.values) > 1 and isinstance(node.values[0], ast.Constant):
            self.changed = True
            head = node.values.pop(0)
            if isinstance(head, ast.Constant) and bool(head.value) == decides:
                return head
        return node if len(node.values) > 1 else node.values[0]

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        self.changed = True
        return node.body if node.test.value else node.orelse

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        taken, other = (node.body, node.orelse) if node.test.value else (node.orelse, node.body)
        if _yields(other):
            return node
        self.changed = True
        return taken

    def _constant(self, value: bool) -> ast.Constant:
        self.changed = True
        return ast.Constant(value)


def _yields(statements: list[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for s in statements for node in own_nodes(s))
