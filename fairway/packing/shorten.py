"""The same program in fewer bytes: without annotations that no code reads, and with short names (python-minifier)."""

import ast
import builtins
from collections import Counter

import python_minifier

from fairway.packing.names import GlobalNames, bound_names, imported_names, parameters
from fairway.packing.schema import CHECKS
from fairway.packing.sweep import Quiet

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Annotations that tell a dataclass what kind of field there is. Of any other it only matters that there is one.
KINDS_OF_FIELD = ("ClassVar", "InitVar", "KW_ONLY")


def strip(tree: ast.Module) -> None:
    """Remove the annotations of functions and of the fields of dataclasses.

    They stay if a decorator may read them: Triton's decorators, those that make operators, and any that Quiet does not
    know. Classes other than dataclasses keep their annotations, because their bases may read them (pydantic does).
    """
    _Strip(Quiet(tree)).visit(tree)


class _Strip(ast.NodeTransformer):
    """Removes the annotations of local variables, parameters and dataclasses."""

    def __init__(self, quiet: Quiet) -> None:
        self.quiet = quiet

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        """Strip a function, unless it has a decorator that reads annotations."""
        if any(map(self._reads, node.decorator_list)):
            return node
        node.returns = None
        for argument in parameters(node.args):
            argument.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def _reads(self, decorator: ast.expr) -> bool:
        name = self.quiet.decorator_name(decorator)
        if name.startswith("pydantic."):
            return not CHECKS.match(name)
        return name.startswith("triton.") or not self.quiet.decorator(decorator)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Strip the methods of a class, and its fields if it is a dataclass."""
        is_dataclass = "dataclasses.dataclass" in map(self.quiet.decorator_name, node.decorator_list)
        for index, part in enumerate(node.body):
            if not isinstance(part, ast.AnnAssign):
                node.body[index] = self.visit(part)
            elif is_dataclass and not any(kind in ast.unparse(part.annotation) for kind in KINDS_OF_FIELD):
                part.annotation = ast.Name("int", ast.Load())
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Turn an annotated assignment to a variable into a plain one."""
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else node


def shorten(tree: ast.Module) -> str:
    """The minified text of a program. The tree is changed on the way and is of no use afterwards."""
    kernels = _kernels(tree)
    imports = _spell_out_imports(tree, kernels)
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    local = {name for kernel in kernels for name in _rename_locals(kernel, given)}
    text = python_minifier.minify(
        ast.unparse(ast.fix_missing_locations(tree)),
        remove_annotations=False,
        remove_literal_statements=True,
        # As `python -O` does. Whatever must hold in the shipped program too is checked by `if` and raised.
        remove_asserts=True,
        # Once compressed, repeated words cost less than names for repeated literals and builtins would.
        hoist_literals=False,
        preserve_locals=sorted(local),
        rename_globals=True,
        preserve_globals=sorted({*dir(builtins), *imports}),
        # A positional-only parameter may have the same name as a key of `**options`, so it must stay positional-only.
        convert_posargs_to_args=False,
    )
    short = ast.parse(text)
    _keep_apart(short)
    minified: str = python_minifier.unparse(short)
    return minified


def _kernels(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions whose text Triton's compiler reads."""
    quiet = Quiet(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    names = [map(quiet.decorator_name, function.decorator_list) for function in functions]
    return [f for f, of in zip(functions, names, strict=True) if any(name.startswith("triton.") for name in of)]


def _spell_out_imports(tree: ast.Module, kernels: list[ast.FunctionDef]) -> set[str]:
    """Give imports that annotate parameters of kernels their names from before linking back; returns these names.

    Triton's interpreter looks for the literal text "tl.constexpr".
    """
    arguments = [argument for kernel in kernels for argument in parameters(kernel.args) if argument.annotation]
    names = {node.id for argument in arguments for node in ast.walk(argument) if isinstance(node, ast.Name)}
    old = {name: name.split("__")[0] for name in names & imported_names(tree).keys()}
    GlobalNames(lambda name: old.get(name, name)).visit(tree)
    return set(old.values())


def _rename_locals(function: ast.FunctionDef, given: set[str]) -> set[str]:
    """Give the local names of a kernel short ones, the shortest to the most frequent, and return all its local names.

    The minifier must leave kernels alone, since it would begin them with assignments such as `A = argument`. Two kinds
    of parameters keep their names: those in `given`, which calls name, and annotated ones, whose names calls may make.
    """
    arguments = parameters(function.args)
    kept = {argument.arg for argument in arguments if argument.annotation or argument.arg in given}
    own = ({argument.arg for argument in arguments} | bound_names(function.body)) - kept
    uses = Counter(node.id for node in ast.walk(function) if isinstance(node, ast.Name))
    uses.update(argument.arg for argument in arguments)
    ranked = [name for name, _ in uses.most_common() if name in own][: len(LETTERS)]
    free = (letter for letter in LETTERS if letter not in uses.keys() - set(ranked))
    short = dict(zip(ranked, free, strict=False))
    _rename(function, short)
    return kept | {short.get(name, name) for name in own}


def _rename(function: ast.FunctionDef, new: dict[str, str]) -> None:
    """Replace names of a function by new ones wherever they stand in it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = new.get(node.arg, node.arg)


def _keep_apart(tree: ast.Module) -> None:
    """Rename locals of kernels that have the name of a global and whose attributes are read inside a branch.

    Where Triton's compiler looks for `return` in a branch, it takes such a local for the global, which has no such
    attribute.
    """
    taken = bound_names(tree.body)
    for kernel in _kernels(tree):
        own = {argument.arg for argument in parameters(kernel.args)} | bound_names(kernel.body)
        branches = [node for node in ast.walk(kernel) if isinstance(node, ast.If)]
        asked = {node.value for branch in branches for node in ast.walk(branch) if isinstance(node, ast.Attribute)}
        mistaken = {node.id for node in asked if isinstance(node, ast.Name)} & own & taken
        free = (letter + digit for digit in "0123456789" for letter in LETTERS if letter + digit not in own | taken)
        _rename(kernel, dict(zip(sorted(mistaken), free, strict=False)))
