"""train_gpt.py: the whole record in one self-extracting file.

The modules that the entry needs are linked to one text (packing/link.py), and the record's settings are written into it
(packing/schema.py). Statements that nothing then reaches are dropped (packing/sweep.py). The rest is minified
(packing/shorten.py), compressed, and put as a string behind a stub of a few lines, in which the seed stands. The file
needs the installed packages and nothing of the repository. The same repository and settings give the same bytes.

Source: PR #1172 and #1493 ship one minified script as raw LZMA2 in base85; #1958 measures Brotli instead. Ours: PPMd
(Shkarin 2002, variant I), which takes 8 % fewer bytes than Brotli for programs of this size.
"""

import ast
import re
import string
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from itertools import permutations
from pathlib import Path
from typing import Any

import pyppmd

from fairway.packing.link import Linked, link
from fairway.packing.names import bound_names, global_names
from fairway.packing.schema import NAMESPACE, Settings
from fairway.packing.shorten import shorten, strip
from fairway.packing.sweep import Parts
from fairway.packing.unasked import drop_unasked

# The module of the whole record, and the function of it that the program calls when it is started.
RECORD, ENTRY = "fairway.whole_record", "run_shipped"
# How many letters back PPMd looks, in the order in which these are tried. 16 packs best, but of some texts the library
# then gives another one back, or calls its own output damaged. The same output always does the same.
PPMD_ORDERS = range(16, 7, -1)
# What messages say of the repository, which has params.yaml and stages while the program has neither.
ADVICE = re.compile(r"; `python -m stages\.\w+` makes (it|them)|params\.yaml: | in params\.yaml \(model\)")
# The stub unpacks the program's text from the string at its end and runs it. Before that it registers the text with
# linecache, where tracebacks, inspect and Triton look for it. It reads the string as bytes from its own file. To Python
# it is a raw string, which may hold every byte but zero, so two letters stand for a zero.
STUB = """#coding:latin1
{late}import linecache,pyppmd
s=pyppmd.decompress_str(open(__file__,"rb").read().split(b{quote}*3)[1][:-1].replace(b"{zero}",b"\\0"),max_order={order})
n="train_gpt/program.py"
linecache.cache[n]=len(s),None,s.splitlines(True),n
exec(compile(s,n,"exec"))
r{quotes}{data}
{quotes}
"""


@dataclass(frozen=True)
class Program:
    """The minified text of a program, and the modules of the repository that it is made of."""

    text: str
    modules: list[str]


def program_text(
    root: Path,
    entry: str,
    arguments: Sequence[Any],
    *,
    late: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
) -> str:
    """The text of make_program."""
    return make_program(root, entry, arguments, late=late, chosen=chosen).text


def make_program(
    root: Path,
    entry: str,
    arguments: Sequence[Any],
    *,
    late: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
) -> Program:
    """The minified program of the module `entry`, such as "fairway.whole_record", with all that it needs under `root`.

    Started as a program, it calls run_shipped(*arguments, *late) of that module. Arguments are JSON values, settings
    (pydantic objects), or classes. The modules of classes are linked as well, because no module imports the
    evaluator's. `late` are names that the stub sets. `chosen`, {"module.TABLE": key}, names tables at module level of
    which only the entry of one key is ever looked up. Raises ValueError on code that cannot be packed.
    """
    linked = link(root, entry, *(argument.__module__ for argument in arguments if isinstance(argument, type)))
    for table, key in (chosen or {}).items():
        _keep_entry(linked, table, key)
    strip(linked.tree)
    _drop_advice(linked.tree)
    settings = Settings(linked)
    while True:
        parts = Parts(linked)
        call = settings.call(parts, linked.names[entry, ENTRY], arguments, late)
        parts.sweep(global_names(call))
        if not drop_unasked(linked.tree, call):
            break
    started = ast.parse(f"if __name__ == '__main__':\n    {ast.unparse(call)}").body
    if NAMESPACE in global_names(call):
        started = [*ast.parse(f"from types import {NAMESPACE}").body, *started]
    modules = linked.modules()
    linked.tree.body += started
    return Program(shorten(linked.tree), modules)


def _drop_advice(tree: ast.Module) -> None:
    """Leave out of the messages of exceptions what can only be done in the repository."""
    raised = (part for node in ast.walk(tree) if isinstance(node, ast.Raise) for part in ast.walk(node))
    for part in raised:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            part.value = ADVICE.sub("", part.value)


def _keep_entry(linked: Linked, table: str, key: str) -> None:
    """Drop all entries but that of one key from a dict at module level. Raises ValueError if there is no such entry."""
    module, _, name = table.rpartition(".")
    for statement in linked.tree.body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict) and bound_names([statement]) == {linked.names.get((module, name))}:
            pairs = [pair for pair in zip(value.keys, value.values, strict=True) if _is(pair[0], key)]
            value.keys, value.values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if pairs:
                return
    raise ValueError(f"{table}: no table with an entry {key!r}")


def _is(node: ast.expr | None, value: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def self_extracting(text: str, **late: int) -> bytes:
    """The file that ships: the stub, which sets the names `late`, and the compressed program.

    Raises ValueError if for no order PPMd gives the same text back and a string can hold its output (see quoted).
    """
    for order in PPMD_ORDERS:
        packed = pyppmd.compress(text, max_order=order)
        with suppress(ValueError):
            if pyppmd.decompress(packed, max_order=order) == text.encode():
                return quoted(packed, order, **late)
    raise ValueError("PPMd does not give the program back, or no string can hold what it makes: change it a little")


def quoted(packed: bytes, order: int = PPMD_ORDERS[0], **late: int) -> bytes:
    """The stub with these bytes as its string. Raises ValueError if they hold both kinds of triple quotes."""
    text = packed.decode("latin1")
    pairs = map("".join, permutations(string.ascii_lowercase, 2))
    zero = next(pair for pair in pairs if pair not in text)
    quotes = next((quotes for quotes in ('"' * 3, "'" * 3) if quotes not in text), None)
    if quotes is None:
        raise ValueError("the compressed program holds both kinds of quotes in threes")
    settings = "".join(f"{name}={value!r}\n" for name, value in late.items())
    data = text.replace("\0", zero)
    return STUB.format(zero=zero, order=order, quote=repr(quotes[0]), quotes=quotes, data=data, late=settings).encode(
        "latin1"
    )


def requirements(text: str) -> str:
    """Lines `package==version` for the packages that a program and its stub import, in the versions installed here.

    A package that the program can do without, and that is not installed here, is left out.
    """
    distributions = packages_distributions()
    packages = {name for top in outside_imports(text) for name in distributions.get(top, [])}
    # Without a build's own suffix, as in 2.13.0+cpu, which no package index knows.
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in sorted(packages, key=str.lower))


def outside_imports(text: str) -> set[str]:
    """Top-level names of the modules that a program and its stub import, without those of Python itself."""
    return _imported(ast.parse(quoted(b""))) | _imported(ast.parse(text))


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names in the import statements anywhere in the text, without those of Python itself."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names
