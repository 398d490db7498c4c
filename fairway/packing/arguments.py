"""Parameters of functions that the program itself calls, and nobody else: always the same, never read, or by place."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from fairway.packing.names import is_harmless
from fairway.packing.strip import read_by_others
from fairway.packing.values import SCALARS, Known, Value

# As the linker writes them, which may add to a name.
DATACLASS = re.compile(r"dataclass(__\w+)?(\(frozen=True\))?$")
BY_HAND = {"__init__", "__post_init__", "classmethod"}
# What makes objects of a dataclass without naming it, or sets what is frozen.
OTHER_MAKERS = re.compile(r"(dataclasses\.)?replace(__\w+)?$|type\(|.*\.__(class|setattr)__$")


@dataclass
class Called:
    """A function with every call of it."""

    function: ast.FunctionDef
    calls: list[ast.Call]
    # A method's first parameter, which no call names.
    bound: int

    def places(self) -> list[ast.arg]:
        """The parameters that calls give, in their order."""
        args = self.function.args
        return [*args.posonlyargs, *args.args, *args.kwonlyargs][self.bound :]

    def default(self, name: str) -> ast.expr | None:
        """The default of a parameter."""
        args = self.function.args
        places = [*args.posonlyargs, *args.args]
        with_default = places[len(places) - len(args.defaults) :]
        pairs = [*zip(with_default, args.defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
        return next((default for argument, default in pairs if argument.arg == name), None)

    def given(self, call: ast.Call, name: str) -> ast.expr | None:
        """What a call gives for a parameter; None where it leaves it to the default."""
        places = [argument.arg for argument in self.places()]
        if places.index(name) < len(call.args):
            return call.args[places.index(name)]
        return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def called_functions(tree: ast.Module) -> Iterator[Called]:
    """Functions, and constructors of classes, that are named only to be called, with plain arguments."""
    mentions: defaultdict[str, int] = defaultdict(int)
    calls: defaultdict[str, list[ast.Call]] = defaultdict(list)
    for node in _read(tree):
        if isinstance(node, ast.Name):
            mentions[node.id] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls[node.func.id].append(node)
            if node.func.id == "isinstance":
                for tested in ast.walk(node.args[1]):
                    mentions[getattr(tested, "id", "")] -= 1
    for statement in tree.body:
        function = _constructor(statement) if isinstance(statement, ast.ClassDef) else statement
        name = getattr(statement, "name", "")
        if not isinstance(function, ast.FunctionDef) or function.decorator_list or not calls[name]:
            continue
        plain = not (function.args.vararg or function.args.kwarg) and all(map(_is_plain, calls[name]))
        if plain and mentions[name] == len(calls[name]):
            yield Called(function, calls[name], int(function is not statement))


def constants(tree: ast.Module) -> tuple[dict[tuple[int, str], Value], dict[tuple[str, str], Value]]:
    """What every call gives the same constant for: parameters of functions, and fields of dataclasses.

    {(identity of the function, parameter): value} and {(dataclass, field): value}.
    """
    parameters: dict[tuple[int, str], Value] = {}
    fields: dict[tuple[str, str], Value] = {}
    classes = {statement.name for statement in tree.body if isinstance(statement, ast.ClassDef)}
    for called in called_functions(tree):
        for name, value in _constants(called):
            if called.function.name in classes:
                fields[called.function.name, name] = value
            else:
                parameters[id(called.function), name] = value
    others = any(isinstance(node, ast.Call) and OTHER_MAKERS.match(ast.unparse(node.func)) for node in ast.walk(tree))
    return parameters, {} if others else fields


def _constants(called: Called) -> Iterator[tuple[str, Value]]:
    for argument in called.places():
        default = called.default(argument.arg)
        given = [called.given(call, argument.arg) or default for call in called.calls]
        values = {repr(value.value) for value in given if isinstance(value, ast.Constant)}
        first = given[0]
        if len(values) == 1 and all(isinstance(value, ast.Constant) for value in given):
            assert isinstance(first, ast.Constant)
            if isinstance(first.value, SCALARS):
                yield argument.arg, Known(first.value)


def drop_unread(tree: ast.Module) -> bool:
    """Take away parameters that their function never reads, and what calls give for them; whether there were any."""
    dropped = False
    for called in called_functions(tree):
        read = {node.id for part in called.function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        for argument in called.places():
            given = [called.given(call, argument.arg) for call in called.calls]
            if argument.arg not in read and all(value is None or is_harmless(value) for value in given):
                for call in called.calls:
                    _take_from_call(call, called, argument.arg)
                _take_from_function(called.function.args, argument)
                dropped = True
    return dropped


def by_place(tree: ast.Module) -> None:
    """Give arguments by place where that is possible: names of parameters are then nobody's business."""
    for called in called_functions(tree):
        args = called.function.args
        if all(
            called.given(call, argument.arg) is not None for call in called.calls for argument in args.kwonlyargs
        ) and not (args.defaults and args.kwonlyargs):
            args.args, args.kwonlyargs, args.kw_defaults = args.args + args.kwonlyargs, [], []
        places = [argument.arg for argument in [*args.posonlyargs, *args.args]][called.bound :]
        every = [argument.arg for argument in called.places()]
        for call in called.calls:
            order = [every.index(keyword.arg or "") for keyword in call.keywords]
            if order != sorted(order) and not all(is_harmless(keyword.value) for keyword in call.keywords):
                continue
            named = {keyword.arg: keyword for keyword in call.keywords}
            for name in places[len(call.args) :]:
                if name not in named:
                    break
                call.args.append(named[name].value)
                call.keywords.remove(named[name])


def places_only(tree: ast.Module) -> None:
    """Mark parameters that are given by place only: the minifier then renames them, wherever they stand.

    Those of functions that are passed on as values stay, since whoever gets them may name their parameters.
    """
    named = _named_by_calls(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    values = [node for node in _read(tree) if id(node) not in called]
    methods = {id(part): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body}
    functions_passed_on = {node.id for node in values if isinstance(node, ast.Name)}
    methods_passed_on = {node.attr for node in values if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        passed_on = methods_passed_on if id(node) in methods else functions_passed_on
        if not isinstance(node, ast.FunctionDef) or node.name in passed_on or read_by_others(node):
            continue
        # A method may be called under its name; a constructor also under that of its class; others under any name.
        names = {node.name, methods.get(id(node), "")} if node.name == "__init__" else {node.name}
        anybody = node.name == "forward" or (node.name.startswith("__") and node.name != "__init__")
        given = {word for name, words in named.items() if anybody or name in {*names, "cls"} for word in words}
        args = node.args
        count = next((i for i, argument in enumerate(args.args) if argument.arg in given), len(args.args))
        args.posonlyargs, args.args = args.posonlyargs + args.args[:count], args.args[count:]


def _named_by_calls(tree: ast.Module) -> dict[str, set[str]]:
    """Names of arguments by the name of what is called."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found[name] |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return found


def _constructor(statement: ast.ClassDef) -> ast.AST | None:
    if not statement.decorator_list:
        return next((part for part in statement.body if getattr(part, "name", "") == "__init__"), None)
    if not _is_plain_dataclass(statement):
        return None
    # As the decorator writes it; all is read there. Under the name of the class, which tells it from others.
    fields = {ast.unparse(part.target): part.value for part in statement.body if isinstance(part, ast.AnnAssign)}
    head = ", ".join(name if value is None else f"{name}={ast.unparse(value)}" for name, value in fields.items())
    return ast.parse(f"def {statement.name}(self, {head}): return {', '.join(fields)}").body[0]


def _is_plain_dataclass(statement: ast.ClassDef) -> bool:
    """One whose fields are the parameters of its constructor, which alone makes and fills its objects."""
    if statement.bases or not all(DATACLASS.match(ast.unparse(wrap)) for wrap in statement.decorator_list):
        return False
    fields = [part for part in statement.body if isinstance(part, ast.AnnAssign)]
    methods = [part for part in statement.body if isinstance(part, ast.FunctionDef)]
    own = {method.name for method in methods} | {ast.unparse(wrap) for m in methods for wrap in m.decorator_list}
    kinds = " ".join(ast.unparse(field.annotation) for field in fields)
    simple = all(field.value is None or is_harmless(field.value) for field in fields)
    return bool(fields) and simple and not own & BY_HAND and not re.search("Var|KW_ONLY", kinds)


def _is_plain(call: ast.Call) -> bool:
    return not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords)


def _take_from_call(call: ast.Call, called: Called, name: str) -> None:
    places = [argument.arg for argument in called.places()]
    if places.index(name) < len(call.args):
        del call.args[places.index(name)]
    call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]


def _take_from_function(args: ast.arguments, argument: ast.arg) -> None:
    if argument in args.kwonlyargs:
        place = args.kwonlyargs.index(argument)
        del args.kwonlyargs[place], args.kw_defaults[place]
        return
    places = [*args.posonlyargs, *args.args]
    from_end = len(places) - places.index(argument)
    if from_end <= len(args.defaults):
        del args.defaults[len(args.defaults) - from_end]
    (args.posonlyargs if argument in args.posonlyargs else args.args).remove(argument)


def _read(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _read(child)
