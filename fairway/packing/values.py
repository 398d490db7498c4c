"""What is known about a value of the program before it runs, from the settings, from annotations and from constants.

A record's settings are one tree of objects. Where an annotation names a class of which the tree has one object, the
value is that object: no code of a shipped program makes another (bundle.py checks it). So `settings.lqer is None` has
an answer when the program is packed.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fairway.packing.names import binds, bound_names, parameters, scope_nodes, statements

# Methods whose first parameter is no object of the class.
UNBOUND = ("staticmethod", "classmethod")
SCALARS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Known:
    """This very value: a constant, a list, or an object of the settings."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """This object of the settings, or None."""

    value: BaseModel


@dataclass(frozen=True)
class Instance:
    """Some object of a class of the program."""

    of: str


@dataclass(frozen=True)
class Alias:
    """What a name of the module level stands for: a function or a class."""

    name: str


Value = Known | Maybe | Instance | Alias | None
Names = dict[str, Value]


def objects(value: Any) -> Iterator[BaseModel]:
    """Every settings object in a tree."""
    if isinstance(value, BaseModel):
        yield value
    parts = vars(value).values() if isinstance(value, BaseModel) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from objects(part)


class Knowledge:
    """Answers for one state of the program's text; ask a new one once the text has changed."""

    def __init__(self, tree: ast.Module, settings: Any, classes: dict[type, str]) -> None:
        """`classes`: the names that the program has for classes of settings."""
        self.tree = tree
        nodes = list(ast.walk(tree))
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in statements(tree) if isinstance(node, ast.FunctionDef)}
        self.of_class: dict[str, list[BaseModel]] = {name: [] for name in classes.values()}
        for found in objects(settings):
            for kind in type(found).__mro__:
                if kind in classes and not any(found is other for other in self.of_class[classes[kind]]):
                    self.of_class[classes[kind]].append(found)
        self.constants = _module_constants(tree, nodes)
        # {(identity of a function, parameter): value} of parameters that are always given the same.
        self.parameters: dict[tuple[int, str], Value] = {}
        # {(dataclass, field): value} of fields that objects are always made with.
        self.fields: dict[tuple[str, str], Value] = {}
        self.tables = _tables(tree, nodes)
        self.stores, self.foreign_stores = _attribute_stores(nodes)
        self._attributes: dict[tuple[str, str], Value] = {}

    def of_annotation(self, annotation: ast.expr | None) -> Value:
        """What an annotation promises."""
        if isinstance(annotation, ast.Name):
            found = self.of_class.get(annotation.id)
            if found is not None:
                return Known(found[0]) if len(found) == 1 else None
            return Instance(annotation.id) if annotation.id in self.classes else None
        if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
            name = annotation.left.id if isinstance(annotation.left, ast.Name) else ""
            found = self.of_class.get(name)
            if found is not None and len(found) < 2:
                return Maybe(found[0]) if found else Known(None)
        return None

    def of(self, node: ast.expr | None, names: Names) -> Value:
        """What is known of an expression, where `names` are the local ones."""
        if isinstance(node, ast.Constant):
            return Known(node.value) if isinstance(node.value, SCALARS) else None
        if isinstance(node, ast.Name):
            if node.id not in names and (node.id in self.functions or node.id in self.classes):
                return Alias(node.id)
            return names[node.id] if node.id in names else self.constants.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.of_attribute(self.of(node.value, names), node.attr)
        if isinstance(node, ast.Call):
            return self._of_call(node.func, names)
        return None

    def of_attribute(self, owner: Value, name: str) -> Value:
        """What is known of an attribute."""
        if isinstance(owner, Known | Maybe) and isinstance(owner.value, BaseModel):
            if name not in vars(owner.value) and not _is_property(owner.value, name):
                return None
            value = getattr(owner.value, name)
            return Known(value) if isinstance(value, (*SCALARS, list, BaseModel)) else None
        if isinstance(owner, Instance):
            if (owner.of, name) not in self._attributes:
                # Until it is known, nothing is: attributes may be defined by each other.
                self._attributes[owner.of, name] = None
                self._attributes[owner.of, name] = self._of_instance(owner.of, name)
            return self._attributes[owner.of, name]
        return None

    def _of_call(self, function: ast.expr, names: Names) -> Value:
        if isinstance(function, ast.Name) and function.id not in names:
            if function.id in self.classes and function.id not in self.of_class:
                return Instance(function.id)
            called = self.functions.get(function.id)
            return self.of_annotation(called.returns) if called else None
        if not isinstance(function, ast.Attribute):
            return None
        owner = self.of(function.value, names)
        if isinstance(function.value, ast.Name) and function.value.id in self.classes:
            owner = Instance(function.value.id)
        methods = self.methods(owner.of) if isinstance(owner, Instance) else {}
        method = methods.get(function.attr)
        return self.of_annotation(method.returns) if method else None

    def methods(self, name: str) -> dict[str, ast.FunctionDef]:
        """Methods of a class and of its bases in the program."""
        node = self.classes[name]
        found: dict[str, ast.FunctionDef] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name) and base.id in self.classes:
                found |= self.methods(base.id)
        return found | {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}

    def family(self, name: str) -> set[str]:
        """A class, its bases and what is derived from any of them."""
        found = {name}
        while True:
            more = {
                other
                for other, node in self.classes.items()
                for base in node.bases
                if isinstance(base, ast.Name) and base.id in self.classes and {other, base.id} & found
                for other in (other, base.id)
            }
            if more <= found:
                return found
            found |= more

    def _of_instance(self, name: str, attribute: str) -> Value:
        """By the annotation in the class body; else by the one place where a method sets it."""
        # The class itself first: it may narrow the annotation of a base.
        family = sorted(self.family(name), key=lambda other: (other != name, other))
        for other in family:
            for part in self.classes[other].body:
                if isinstance(part, ast.AnnAssign) and getattr(part.target, "id", None) == attribute:
                    stored = attribute in self.foreign_stores or self.stores[other, attribute]
                    made_with = None if stored else self.fields.get((other, attribute))
                    return made_with or self.of_annotation(part.annotation)
                if isinstance(part, ast.Assign) and attribute in bound_names([part]):
                    return None
                if isinstance(part, ast.FunctionDef) and part.name == attribute:
                    return self.of_annotation(part.returns) if _decorated(part, "property") else None
        stores = [store for other in family for store in self.stores[other, attribute]]
        if len(stores) != 1 or attribute in self.foreign_stores:
            return None
        method, value = stores[0]
        owner = next(other for other in family if method in self.classes[other].body)
        return self.of(value, self.local_names(method, {}, owner))

    def local_names(self, function: Any, outer: Names, owner: str | None = None) -> Names:
        """What is known of the local names of a function inside `outer` ones; `owner`: the class it is a method of."""
        body = function.body if isinstance(function.body, list) else [function.body]
        arguments = parameters(function.args)
        own = scope_nodes(body)
        counts = Counter(name for node in own for name in binds(node))
        elsewhere = {name for node in own if isinstance(node, ast.Global) for name in node.names}
        names: Names = dict(outer) | dict.fromkeys(counts.keys() - elsewhere)
        kept = {name for node in ast.walk(function) if isinstance(node, ast.Nonlocal) for name in node.names}
        stars = (function.args.vararg, function.args.kwarg)
        for argument in arguments:
            known = None if argument in stars else self.of_annotation(argument.annotation)
            known = self.parameters.get((id(function), argument.arg), known)
            names[argument.arg] = None if argument.arg in counts or argument.arg in kept else known
        if owner and arguments and not _decorated(function, *UNBOUND):
            found = self.of_class.get(owner, [])
            names[arguments[0].arg] = Known(found[0]) if len(found) == 1 else Instance(owner)
        given = {argument.arg for argument in arguments}
        for name, value in _assignments(own):
            if counts[name] == 1 and name not in kept | given:
                names[name] = self.of(value, names)
        return names


def _assignments(own: list[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Every `name = value` among the nodes of a scope, pairs of tuples taken apart."""
    for node in own:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            for target, value in pairs(node.targets[0], node.value):
                if isinstance(target, ast.Name):
                    yield target.id, value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Targets with their values; a tuple of unknown parts is no pair of anything."""
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return []


def _module_constants(tree: ast.Module, nodes: list[ast.AST]) -> Names:
    """Names set once, to a constant, at module level."""
    own = scope_nodes(tree.body)
    counts = Counter(name for node in own for name in binds(node))
    changed = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    found: Names = {}
    for name, value in _assignments(own):
        if counts[name] == 1 and name not in changed and isinstance(value, ast.Constant):
            found[name] = Known(value.value) if isinstance(value.value, SCALARS) else None
    return found


def _tables(tree: ast.Module, nodes: list[ast.AST]) -> dict[str, dict[str, ast.expr]]:
    """Dictionaries of constant strings at module level that are only looked up."""
    found: dict[str, dict[str, ast.expr]] = {}
    for name, value in _assignments(scope_nodes(tree.body)):
        keys = value.keys if isinstance(value, ast.Dict) else []
        if isinstance(value, ast.Dict) and keys and all(isinstance(k, ast.Constant) for k in keys):
            found[name] = {ast.literal_eval(k): v for k, v in zip(keys, value.values, strict=True) if k}
    quiet = Counter[str]()
    for node in nodes:
        looked_up = node.value if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) else None
        if isinstance(node, ast.Compare):
            looked_up = node.comparators[0]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            looked_up = node.args[0]
        quiet[getattr(looked_up, "id", "")] += 1
    mentions = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    # Once where it is set.
    return {name: table for name, table in found.items() if mentions[name] == quiet[name] + 1}


def _attribute_stores(nodes: list[ast.AST]) -> tuple[Any, set[str]]:
    """{(class, attribute): [(method, value)]} of what methods set on self, and attributes set on anything else."""
    stores: defaultdict[tuple[str, str], list[tuple[ast.FunctionDef, ast.expr | None]]] = defaultdict(list)
    ours: set[int] = set()
    for node in nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.args.args and not _decorated(method, *UNBOUND):
                for target, value in _self_stores(method):
                    stores[node.name, target.attr].append((method, value))
                    ours.add(id(target))
    every = [node for node in nodes if isinstance(node, ast.Attribute)]
    foreign = {node.attr for node in every if not isinstance(node.ctx, ast.Load) and id(node) not in ours}
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            name = node.args[1]
            foreign |= {str(name.value)} if isinstance(name, ast.Constant) else {node.attr for node in every}
    return stores, foreign


def _self_stores(method: ast.FunctionDef) -> Iterator[tuple[ast.Attribute, ast.expr | None]]:
    own = method.args.args[0].arg
    known: dict[int, ast.expr] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            known |= {id(t): v for target in node.targets for t, v in pairs(target, node.value)}
        elif isinstance(node, ast.AnnAssign) and node.value:
            known[id(node.target)] = node.value
    for node in ast.walk(method):
        stored = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if stored and isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == own:
            yield node, known.get(id(node))


def _is_property(value: BaseModel, name: str) -> bool:
    return isinstance(getattr(type(value), name, None), property)


def _decorated(function: ast.AST, *names: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id in names for d in getattr(function, "decorator_list", ()))
