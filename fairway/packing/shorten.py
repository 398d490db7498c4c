"""The same program in fewer bytes: short names, no annotations, arguments by place."""

import ast
import builtins
from collections import Counter

import python_minifier

from fairway.packing.arguments import by_place, places_only
from fairway.packing.names import GlobalNames, bound_names, parameters
from fairway.packing.strip import TEXT_READ, Plain, Strip, read_by_others

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def shorten(tree: ast.Module, typed: set[str]) -> str:
    """The text of a program; its tree is used up. `typed`: names of classes whose annotations are read."""
    tree = Plain().visit(Strip(typed).visit(tree))
    by_place(tree)
    places_only(tree)
    local, glob = _shorten_text_read(tree)
    text = ast.unparse(ast.fix_missing_locations(tree))
    text = python_minifier.minify(
        text,
        remove_annotations=False,
        remove_literal_statements=True,
        # Repeated literals cost little once compressed; names of their own for them cost more.
        hoist_literals=False,
        rename_locals=True,
        preserve_locals=local,
        rename_globals=True,
        preserve_globals=glob,
        prefer_single_line=True,
    )
    short = ast.parse(text)
    for node in ast.walk(short):
        if isinstance(node, ast.arguments):
            node.posonlyargs, node.args = [], node.posonlyargs + node.args
    _keep_apart(short)
    minified: str = python_minifier.unparse(short)
    return minified


def _shorten_text_read(tree: ast.Module) -> tuple[list[str], list[str]]:
    """Give functions whose text is read by others short local names, which the minifier must leave alone.

    It would put `A = argument` at their start and write `B` for `range`. Returns the local names to leave alone, and
    the names of Python and of imports that these functions use: Triton's interpreter looks for "tl.constexpr".
    """
    local: set[str] = set()
    glob = _spell_out_imports(tree)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and read_by_others(function, TEXT_READ):
            local |= _rename_locals(function)
            names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            glob |= {name for name in names if hasattr(builtins, name)}
    return sorted(local), sorted(glob)


def _spell_out_imports(tree: ast.Module) -> set[str]:
    """Give the imports in annotations of such functions the names back that they had before linking."""
    annotations = [
        argument.annotation
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and read_by_others(function, TEXT_READ)
        for argument in parameters(function.args)
        if argument.annotation
    ]
    names = {node.id for part in annotations for node in ast.walk(part) if isinstance(node, ast.Name)}
    old = {name: name.split("__")[0] for name in names}
    GlobalNames(lambda name: old.get(name, name)).visit(tree)
    return set(old.values())


def _rename_locals(function: ast.FunctionDef) -> set[str]:
    """Short names by frequency, but for annotated parameters: those are given by name, and the name may be computed."""
    arguments = parameters(function.args)
    kept = {argument.arg for argument in arguments if argument.annotation}
    own = ({argument.arg for argument in arguments} | bound_names(function.body)) - kept
    uses = Counter(node.id for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in own)
    uses.update(argument.arg for argument in arguments if argument.arg in own)
    free = (letter for letter in LETTERS if letter not in kept)
    short = {name: letter for (name, _), letter in zip(uses.most_common(), free, strict=False)}
    _rename(function, short)
    return kept | {short.get(name, name) for name in own}


def _rename(function: ast.FunctionDef, new: dict[str, str]) -> None:
    """Give names of a function new ones, wherever they stand in it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = new.get(node.arg, node.arg)


def _keep_apart(tree: ast.Module) -> None:
    """Rename locals of Triton's functions that a branch asks for an attribute, where a global has their name.

    Looking for `return` in a branch, Triton's compiler takes such a local for the global, which has no such attribute.
    """
    taken = bound_names(tree.body)
    for function in ast.walk(tree):
        # What "triton" is called by now is unknown.
        if not (isinstance(function, ast.FunctionDef) and read_by_others(function, (".jit",))):
            continue
        own = {argument.arg for argument in parameters(function.args)} | bound_names(function.body)
        branches = [node for node in ast.walk(function) if isinstance(node, ast.If)]
        asked = {node.value for branch in branches for node in ast.walk(branch) if isinstance(node, ast.Attribute)}
        mistaken = {node.id for node in asked if isinstance(node, ast.Name)} & own & taken
        free = (letter + digit for digit in "0123456789" for letter in LETTERS if letter + digit not in own | taken)
        _rename(function, dict(zip(sorted(mistaken), free, strict=False)))
