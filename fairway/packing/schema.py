"""The settings inside a packed program: plain namespaces, since the pipeline has already checked them.

An object keeps its own class only if that can matter: if the class has methods that the program may call, or if the
program makes objects of the class, reads data into it, or asks for it (isinstance, match).
"""

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from fairway.packing.link import Linked
from fairway.packing.names import global_names
from fairway.packing.sweep import Parts, Quiet

NAMESPACE = "SimpleNamespace"
# Decorators of functions that are called only while an object is made.
CHECKS = re.compile(r"pydantic\.(field|model)_(validator|serializer)$")


class Settings:
    """Writes the call that starts a program, whose arguments are settings, classes and values of JSON.

    It is made of the whole text, since it looks at classes of settings that need not ship.
    """

    def __init__(self, linked: Linked) -> None:
        self.names, self.quiet = linked.names, Quiet(linked.tree)
        self.classes = {node.name: node for node in linked.tree.body if isinstance(node, ast.ClassDef)}
        # Names that the program mentions other than as a base of a class, and names of attributes that it may read.
        self.used: set[str] = set()
        self.read: set[str] = set()

    def call(self, parts: Parts, start: str, values: Sequence[Any], late: Sequence[str]) -> ast.Call:
        """The call of `start` with the values, followed by the names `late`, which whoever runs the text has to set.

        `parts` are the statements that the program has at present. Which classes are needed depends on what the program
        reaches, and that depends on the classes in this call. So the call is written again until no new class or
        attribute turns up. Raises ValueError on a value that is neither one of JSON nor of a class of the program, or
        that cannot be made again from its data.
        """
        self.used, self.read = set(), set()
        while True:
            arguments = [*map(self._written, values), *(ast.Name(name, ast.Load()) for name in late)]
            call = ast.Call(ast.Name(start, ast.Load()), arguments, [])
            reached = parts.reached(global_names(call))
            used = {name for part in reached for name in _used(part)}
            read = {name for part in reached for name in attributes_read(part)}
            if used <= self.used and read <= self.read:
                return call
            self.used |= used
            self.read |= read

    def _written(self, value: Any) -> ast.expr:
        if isinstance(value, list):
            return ast.List([*map(self._written, value)], ast.Load())
        if isinstance(value, type):
            return ast.Name(self._name(value), ast.Load())
        if not isinstance(value, BaseModel):
            return _literal(value)
        if not self._is_whole(type(value)):
            parts = vars(value) | {name: getattr(value, name) for name in self._properties(type(value))}
            fields = [ast.keyword(name, self._written(part)) for name, part in parts.items()]
            return ast.Call(ast.Name(NAMESPACE, ast.Load()), [], fields)
        data = value.model_dump()
        if type(value).model_validate(data) != value:
            raise ValueError(f"{type(value).__name__}: its data do not give the settings back")
        return ast.Call(ast.Name(self._name(type(value)), ast.Load()), [], [ast.keyword(None, _literal(data))])

    def _properties(self, kind: type[BaseModel]) -> list[str]:
        """Properties that the program may read. Settings never change, so a property is written as one more field."""
        own = [base for base in kind.__mro__ if base not in (BaseModel, object)]
        found = {name for base in own for name, part in vars(base).items() if isinstance(part, property)}
        return sorted(found & self.read)

    def _name(self, kind: type) -> str:
        name = self.names.get((kind.__module__, kind.__name__))
        if name is None:
            raise ValueError(f"{kind.__name__}: a class that is not the program's")
        return name

    def _is_whole(self, kind: type[BaseModel]) -> bool:
        """Whether an object must keep its class."""
        classes = {self._name(base) for base in kind.__mro__ if base not in (BaseModel, object)}
        pydantic = any(self.quiet.origins.get(name) == "pydantic.BaseModel" for name in self.used)
        return pydantic or bool(classes & self.used) or any(self._does_more(self.classes[name]) for name in classes)

    def _does_more(self, node: ast.ClassDef) -> bool:
        """Whether a class has anything besides fields, a configuration, checks, and methods that nothing calls."""
        return not all(map(self._is_passive, node.body))

    def _is_passive(self, part: ast.stmt) -> bool:
        if isinstance(part, ast.AnnAssign):
            return "ClassVar" not in ast.unparse(part.annotation)
        if isinstance(part, ast.FunctionDef):
            names = [self.quiet.decorator_name(decorator) for decorator in part.decorator_list]
            if any(map(CHECKS.match, names)) or "property" in map(ast.unparse, part.decorator_list):
                return True
            # A method such as __len__ is called by Python itself.
            return part.name not in self.read and not part.name.startswith("__")
        return isinstance(part, ast.Expr | ast.Pass) or ast.unparse(part).startswith("model_config =")


def attributes_read(tree: ast.AST) -> Iterator[str]:
    """Names of attributes that may be read: behind a dot, in a pattern of `match`, or in a string that getattr may get.

    Docstrings do not count, since no code reads them.
    """
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.MatchClass):
            yield from node.kwd_attrs
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\w+", node.value)


def _literal(value: Any) -> ast.expr:
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ValueError(f"{text}: an argument that cannot be written down")
    return ast.parse(text, mode="eval").body


def _used(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement mentions, except as bases of classes."""
    classes = [node for node in ast.walk(statement) if isinstance(node, ast.ClassDef)]
    bases = {id(part) for node in classes for base in node.bases for part in ast.walk(base)}
    yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and id(node) not in bases)
