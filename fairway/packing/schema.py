"""The settings inside a shipped program: objects without a schema, since the pipeline has checked them.

Only a class that something else is read into keeps one: a model file tells its network. It accepts the network of the
record and no other, which is what lets the rest of the program be folded.
"""

import ast
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from fairway.packing.values import Knowledge, Known, Maybe, objects

EXPECTED = "EXPECTED__"
CHECK = f"""
@model_validator(mode="after")
def check(self):
    if self.model_dump() != {EXPECTED}:
        raise ValueError("the network is not this record's")
    return self
"""


def chosen_options(settings: Any) -> dict[frozenset[str], set[str]]:
    """For every set of names that a setting chooses from: the names that the settings choose."""
    found: dict[frozenset[str], set[str]] = {}
    for section in objects(settings):
        for name, field in type(section).model_fields.items():
            if typing.get_origin(field.annotation) is typing.Literal:
                found.setdefault(frozenset(typing.get_args(field.annotation)), set()).add(getattr(section, name))
    return found


def keep_chosen(tree: ast.Module, options: dict[frozenset[str], set[str]]) -> None:
    """A table of everything that a setting chooses from keeps what is chosen."""
    for statement in tree.body:
        table = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if not isinstance(table, ast.Dict):
            continue
        keys = [key.value if isinstance(key, ast.Constant) else None for key in table.keys]
        chosen = options.get(frozenset(keys)) if len(keys) > 1 else None  # type: ignore[arg-type]
        if chosen:
            kept = [i for i, key in enumerate(keys) if key in chosen]
            table.keys, table.values = [table.keys[i] for i in kept], [table.values[i] for i in kept]


def slim(tree: ast.Module, settings: Any, classes: dict[type, str]) -> None:
    """Take the fields and checks of settings classes away; what else is read into one must be as in the record."""
    names = set(classes.values())
    found = {classes[kind]: section for section in objects(settings) for kind in (type(section),) if kind in classes}
    read_into = {
        node.id
        for statement in tree.body
        if isinstance(statement, ast.ClassDef) and statement.name not in names
        for field in statement.body
        if isinstance(field, ast.AnnAssign)
        for node in ast.walk(field.annotation)
        if isinstance(node, ast.Name) and node.id in found
    }
    validator = next((name for name in _bound(tree) if name.startswith("model_validator__")), "")
    for statement in list(tree.body):
        if isinstance(statement, ast.ClassDef) and statement.name in names:
            methods = [part for part in statement.body if isinstance(part, ast.FunctionDef) and not _is_check(part)]
            statement.body = [*methods]
            if statement.name in read_into:
                _expect(tree, statement, found, classes, validator)
            statement.body = statement.body or [ast.Pass()]


def _expect(
    tree: ast.Module,
    statement: ast.ClassDef,
    found: dict[str, BaseModel],
    classes: dict[type, str],
    validator: str,
) -> None:
    """Fields for the values of the record, and a check that they are these; the same for sections inside, unchecked."""
    section = found[statement.name]
    expected = EXPECTED + statement.name
    values = ast.parse(f"{expected} = {section.model_dump()!r}").body
    tree.body[tree.body.index(statement) : tree.body.index(statement)] = values
    check = CHECK.replace(EXPECTED, expected).replace("model_validator", validator)
    for inner in objects(section):
        owner = next(s for s in tree.body if isinstance(s, ast.ClassDef) and s.name == classes[type(inner)])
        fields = [f"{name}: {_field(value, classes)}" for name, value in vars(inner).items()]
        owner.body = [*ast.parse("\n".join(fields)).body, *(p for p in owner.body if isinstance(p, ast.FunctionDef))]
    statement.body += ast.parse(check).body


def _field(value: Any, classes: dict[type, str]) -> str:
    return classes[type(value)] if isinstance(value, BaseModel) else "object"


class Written:
    """Writes settings as an expression. `mentioned`: attributes that the program mentions; others are left out."""

    def __init__(self, tree: ast.Module, mentioned: set[str], classes: dict[type, str]) -> None:
        self.mentioned, self.classes = mentioned, classes
        self.expected = {name for name in _bound(tree) if name.startswith(EXPECTED)}

    def write(self, value: Any) -> str:
        """The expression: namespaces, or the class itself where it has a schema."""
        if not isinstance(value, BaseModel):
            return repr(value)
        name = self.classes.get(type(value), "")
        if EXPECTED + name in self.expected:
            return f"{name}(**{EXPECTED}{name})"
        fields = [f"{key}={self.write(part)}" for key, part in vars(value).items() if key in self.mentioned]
        return f"SimpleNamespace({', '.join(fields)})"


def looked_up(tree: ast.Module, knowledge: Knowledge) -> set[str]:
    """Fields of sections of which the program asks by names that it computes."""
    found: set[str] = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = knowledge.local_names(function, {})
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                owner = knowledge.of(node.args[0], names)
                if isinstance(owner, Known | Maybe) and isinstance(owner.value, BaseModel):
                    found |= set(vars(owner.value))
    return found


def _is_check(function: ast.FunctionDef) -> bool:
    return any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)


def _bound(tree: ast.Module) -> Iterable[str]:
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in statement.names)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id
