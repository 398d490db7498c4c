"""train_gpt.py: the whole record in one self-extracting file.

The modules that the entry needs are linked to one text (packing/link.py). What the record's settings decide is decided
there (packing/fold.py), what is then out of reach falls away (packing/sweep.py), and the rest is written shortly
(packing/shorten.py), compressed, and put as a string behind a stub of a few lines. The file needs
the installed packages and nothing of the repository. Same repository, same settings, same bytes.
Source: PR #1172 and #1493 ship LZMA2-raw + base85 of one minified script; #1958 measures Brotli instead. Ours: PPMd
(Shkarin 2002, variant I), which takes 8 % fewer bytes than Brotli for programs of this size.
"""

import ast
import re
import string
import typing
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pyppmd
from pydantic import BaseModel

from fairway.packing.arguments import constants, drop_unread
from fairway.packing.fold import Fold
from fairway.packing.link import Linked, link
from fairway.packing.names import bound_names
from fairway.packing.schema import Written, chosen_options, keep_chosen, looked_up, slim
from fairway.packing.shorten import shorten
from fairway.packing.sweep import Sweep
from fairway.packing.values import Knowledge

# The function of the entry module that a started program calls.
ENTRY = "run_shipped"
# Makes of its own string the program's text, tells linecache of it (tracebacks, inspect, Triton) and runs it. It reads
# the string as bytes; to Python it is a raw one, which bears everything but a zero: two letters stand for that.
STUB = """#coding:latin1
import linecache,pyppmd
s=pyppmd.decompress_str(open(__file__,"rb").read().split(b{quote}*3)[1][:-1].replace(b"{zero}",b"\\0"),max_order=16)
n="train_gpt/program.py"
linecache.cache[n]=len(s),None,s.splitlines(True),n
exec(compile(s,n,"exec"))
r{quotes}{data}
{quotes}
"""


def bundle(root: Path, entry: str, arguments: Sequence[Any]) -> bytes:
    """The file's bytes: `entry` (a module under `root`, say "fairway.whole_record") and what it needs of `root`.

    Started as a program the file calls run_shipped(*arguments) of the entry module. Arguments are JSON values, or
    settings (pydantic objects, which must not be changed or made anew by the program): what depends on them alone is
    worked out here. Raises ValueError on code that cannot be linked.
    """
    return self_extracting(program_text(root, entry, arguments))


def program_text(root: Path, entry: str, arguments: Sequence[Any]) -> str:
    """The minified program."""
    linked = link(root, entry)
    tree, start = linked.tree, linked.names[entry, ENTRY]
    settings = [argument for argument in arguments if isinstance(argument, BaseModel)]
    classes = _settings_classes(linked, settings)
    slim(tree, settings, classes)
    keep_chosen(tree, chosen_options(settings))
    typed = _typed_classes(tree)
    reached = Sweep(tree, start, typed)
    reached.sweep()
    _check_settings_stay(tree, reached.attributes, set(classes.values()))
    changed = True
    while changed:
        while _fold(tree, settings, classes, reached.made):
            pass
        reached = Sweep(tree, start, typed)
        changed = reached.sweep()
    mentioned = reached.attributes | looked_up(tree, Knowledge(tree, settings, classes))
    written = Written(tree, mentioned, classes)
    call = f"{start}({', '.join(written.write(argument) for argument in arguments)})"
    if "SimpleNamespace" in call:
        tree.body += ast.parse("from types import SimpleNamespace").body
    tree.body += ast.parse(f"if __name__ == '__main__':\n    {call}").body
    return shorten(tree, typed)


def _fold(tree: ast.Module, settings: Any, classes: dict[type, str], made: set[str]) -> bool:
    """Once over the program; whether that changed it."""
    knowledge = Knowledge(tree, settings, classes)
    knowledge.parameters, knowledge.fields = constants(tree)
    fold = Fold(knowledge, made=made)
    fold.visit(tree)
    return drop_unread(tree) or fold.changed


def self_extracting(text: str) -> bytes:
    """A program behind the stub that unpacks it.

    Raises ValueError if PPMd does not give the same text back, or puts out what no string holds (see quoted).
    """
    packed = pyppmd.compress(text, max_order=16)
    if pyppmd.decompress_str(packed, max_order=16) != text:
        raise ValueError("PPMd does not give the program back")
    return quoted(packed)


def program_of(data: bytes) -> str:
    """The text of the program that a file made by self_extracting holds. Raises ValueError if it holds none."""
    read = re.search(rb"split\(b['\"](['\"])['\"]\*3\)\[1\]\[:-1\]\.replace\(b\"([a-z]{2})\"", data)
    if read is None:
        raise ValueError("not a program packed by fairway")
    quote, zero = read.groups()
    packed = data.split(quote * 3)[1][:-1].replace(zero, b"\0")
    return str(pyppmd.decompress_str(packed, max_order=16))


def quoted(packed: bytes) -> bytes:
    """The stub with these bytes as its string. Raises ValueError if they hold both kinds of quotes in threes."""
    text = packed.decode("latin1")
    pairs = map("".join, permutations(string.ascii_lowercase, 2))
    zero = next(pair for pair in pairs if pair not in text)
    quotes = next((quotes for quotes in ('"' * 3, "'" * 3) if quotes not in text), None)
    if quotes is None:
        raise ValueError("the compressed program holds both kinds of quotes in threes: change it a little")
    data = text.replace("\0", zero)
    return STUB.format(zero=zero, quote=repr(quotes[0]), quotes=quotes, data=data).encode("latin1")


def _check_settings_stay(tree: ast.Module, attributes: set[str], classes: set[str]) -> None:
    """Raise ValueError if the program makes or changes settings: then they would not be what was folded."""
    made = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    found = sorted((made & classes) | ({"model_copy", "model_construct"} & attributes))
    if found:
        raise ValueError(f"the shipped program makes settings of its own: {', '.join(found)}")


def _settings_classes(linked: Linked, settings: Sequence[BaseModel]) -> dict[type, str]:
    """What the program calls the classes of the settings, of their parts and of their bases."""
    kinds = {kind for section in settings for kind in _kinds(type(section))}
    found = {base for kind in kinds for base in kind.__mro__ if issubclass(base, BaseModel) and base.model_fields}
    named = {kind: linked.names.get((kind.__module__, kind.__name__)) for kind in found}
    return {kind: name for kind, name in sorted(named.items(), key=lambda item: str(item[1])) if name}


def _kinds(annotation: Any) -> Iterator[type[BaseModel]]:
    """Settings classes in an annotation, and in those of their fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _kinds(field.annotation)
    for part in typing.get_args(annotation):
        yield from _kinds(part)


def _typed_classes(tree: ast.Module) -> set[str]:
    """Classes whose annotations pydantic reads."""
    found = {name for statement in tree.body for name in bound_names([statement]) if name.startswith("BaseModel__")}
    while True:
        derived = {
            statement.name
            for statement in tree.body
            if isinstance(statement, ast.ClassDef)
            and {base.id for base in statement.bases if isinstance(base, ast.Name)} & found
        }
        if derived <= found:
            return found
        found |= derived
