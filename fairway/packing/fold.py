"""What the settings decide is decided when the program is packed: constants for settings, one branch of two."""

import ast
import operator
import re
from typing import Any

from pydantic import BaseModel

from fairway.packing.names import COMPREHENSIONS, bound_names, is_harmless
from fairway.packing.values import SCALARS, Alias, Instance, Knowledge, Known, Maybe, Names, Value

ORDER: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Fold(ast.NodeTransformer):
    """Replaces expressions by their values and drops what can then never run. `changed` tells whether it did."""

    def __init__(self, knowledge: Knowledge, *, made: set[str]) -> None:
        """`made`: the classes of the program that it makes objects of."""
        self.knowledge, self.made = knowledge, made
        self.names: Names = {}
        self.owner: str | None = None
        self.changed = False
        # Nodes that were visited, by identity.
        self.done: dict[int, Any] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Its methods know their class."""
        outer, self.owner = self.owner, node.name
        node.body = self._block(node.body)
        self.owner = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Annotations and decorators stay as they are."""
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.visit(default) for default in node.args.kw_defaults]
        outer, owner = self.names, self.owner
        self.names, self.owner = self.knowledge.local_names(node, outer, owner), None
        node.body = self._block(node.body)
        self.names, self.owner = outer, owner
        self._drop_unread(node)
        return node

    def _drop_unread(self, function: ast.FunctionDef) -> None:
        """Local names that are set to something simple and never read."""
        nodes = list(ast.walk(function))
        kept = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)}
        kept |= {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
        for node in nodes:
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list) and not isinstance(node, ast.ClassDef):
                    left = [part for part in block if not _is_unread(part, kept)]
                    self.changed |= len(left) < len(block)
                    setattr(node, field, left or ([ast.Pass()] if field == "body" else []))

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        """A function of one expression."""
        outer, owner = self.names, self.owner
        self.names, self.owner = self.knowledge.local_names(node, outer), None
        node.body = self.visit(node.body)
        self.names, self.owner = outer, owner
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Blocks as blocks; names that a comprehension binds are its own."""
        outer = self.names
        if isinstance(node, COMPREHENSIONS):
            targets = bound_names([generator.target for generator in node.generators])
            self.names = outer | dict.fromkeys(targets)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, self._block(block, needed=field == "body"))
        super().generic_visit(node)
        self.names = outer
        return node

    def _block(self, block: list[ast.stmt], *, needed: bool = True) -> list[ast.stmt]:
        """Statements visited one by one; nothing behind one that leaves."""
        new: list[ast.stmt] = []
        for statement in block:
            visited = self.visit(statement)
            new += visited if isinstance(visited, list) else [visited] if visited else []
            if new and isinstance(new[-1], ENDS):
                break
        return new or ([ast.Pass()] if needed else [])

    def visit(self, node: ast.AST) -> Any:
        """Once only: blocks are visited by generic_visit before their fields are."""
        if id(node) in self.done:
            return node
        new = super().visit(node)
        self.done |= {id(part): part for part in (new if isinstance(new, list) else [new])}
        return new

    def _constant(self, node: ast.expr, value: Value) -> ast.expr:
        """A constant, or a list of them, in the place of an expression whose value it is."""
        if not isinstance(value, Known) or isinstance(node, ast.Constant):
            return node
        parts = value.value if isinstance(value.value, list) else [value.value]
        if not all(isinstance(part, SCALARS) for part in parts):
            return node
        self.changed = True
        return ast.parse(repr(value.value), mode="eval").body

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A name of a known value; long strings stay where they are."""
        if not isinstance(node.ctx, ast.Load):
            return node
        value = self.knowledge.of(node, self.names)
        if isinstance(value, Alias) and node.id in self.names:
            self.changed = True
            return ast.Name(value.name, ast.Load())
        long = node.id not in self.names and isinstance(value, Known) and len(repr(value.value)) > 6
        return node if long else self._constant(node, value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """An attribute of a known value."""
        if isinstance(node.ctx, ast.Load):
            new = self._constant(node, self.knowledge.of(node, self.names))
            if new is not node:
                return new
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`getattr` of a constant name, and `isinstance`."""
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called == "getattr" and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            self.changed = True
            return self.visit(ast.Attribute(node.args[0], str(node.args[1].value), ast.Load()))
        if called == "isinstance" and isinstance(node.args[1], ast.Name):
            known = self._is_a(self.knowledge.of(node.args[0], self.names), node.args[1].id)
            return node if known is None else self._constant(node, Known(known))
        return node

    def _is_a(self, value: Value, name: str) -> bool | None:
        """Whether a value is of a class of the program, where that is certain."""
        if isinstance(value, Known) and name in self.knowledge.of_class:
            return any(value.value is other for other in self.knowledge.of_class[name])
        if name in self.knowledge.classes and name not in self.made and name not in self.knowledge.of_class:
            return False
        return True if isinstance(value, Instance) and value.of == name else None

    def truth(self, node: ast.expr) -> bool | None:
        """Whether an expression is true, where that is certain."""
        if isinstance(node, ast.BoolOp):
            # What stands before the operand that decides is read for nothing, if reading is all that it takes.
            decides = isinstance(node.op, ast.Or)
            last = self.truth(node.values[-1]) == decides
            return decides if last and all(isinstance(part, ast.Name) for part in node.values[:-1]) else None
        value = self.knowledge.of(node, self.names)
        if not isinstance(value, Known):
            return None
        return True if isinstance(value.value, BaseModel) else bool(value.value)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Comparisons of two known values."""
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        left, right = (self.knowledge.of(side, self.names) for side in (node.left, node.comparators[0]))
        op, result = node.ops[0], None
        if isinstance(op, ast.Is | ast.IsNot) and right == Known(None):
            if isinstance(left, Known | Instance):
                result = (left == Known(None)) == isinstance(op, ast.Is)
        elif isinstance(op, ast.In | ast.NotIn) and isinstance(left, Known):
            options = self._options(node.comparators[0], right)
            if options is not None:
                result = (left.value in options) == isinstance(op, ast.In)
        elif isinstance(left, Known) and isinstance(right, Known) and type(op) in ORDER:
            result = ORDER[type(op)](left.value, right.value)
        return node if result is None else self._constant(node, Known(result))

    def _options(self, node: ast.expr, value: Value) -> list[Any] | None:
        """What a collection holds, if all of it is known."""
        if isinstance(value, Known | Maybe):
            return value.value if isinstance(value.value, list) else None
        if isinstance(node, ast.Name) and node.id in self.knowledge.tables:
            return list(self.knowledge.tables[node.id])
        if not isinstance(node, ast.Tuple | ast.List | ast.Set):
            return None
        constants = [element.value for element in node.elts if isinstance(element, ast.Constant)]
        return constants if len(constants) == len(node.elts) else None

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """What a table of names has under a known key."""
        self.generic_visit(node)
        table = self.knowledge.tables.get(getattr(node.value, "id", ""), {})
        found = table.get(node.slice.value) if isinstance(node.slice, ast.Constant) else None  # type: ignore[arg-type]
        if not isinstance(found, ast.Name):
            return node
        self.changed = True
        return ast.Name(found.id, ast.Load())

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Sums and products of whole numbers."""
        self.generic_visit(node)
        sides = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
        if [type(side) for side in sides] != [int, int] or type(node.op) not in ARITHMETIC:
            return node
        if sides[1] == 0 and isinstance(node.op, ast.FloorDiv | ast.Mod):
            return node
        return self._constant(node, Known(ARITHMETIC[type(node.op)](*sides)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Constants inside as text."""
        self.generic_visit(node)
        for i, part in enumerate(node.values):
            value = part.value if isinstance(part, ast.FormattedValue) and not part.format_spec else None
            if isinstance(value, ast.Constant) and isinstance(part, ast.FormattedValue) and part.conversion == -1:
                node.values[i] = ast.Constant(str(value.value))
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """`not` of what is known."""
        self.generic_visit(node)
        truth = self.truth(node.operand) if isinstance(node.op, ast.Not) else None
        return node if truth is None else self._constant(node, Known(not truth))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Operands that decide end the chain, those that cannot are left out."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        kept: list[ast.expr] = []
        for i, operand in enumerate(node.values):
            truth = self.truth(operand)
            if truth is None or truth == decides or i == len(node.values) - 1:
                kept.append(operand)
            if truth == decides:
                break
        if len(kept) == len(node.values):
            return node
        self.changed = True
        node.values = kept
        return node if len(kept) > 1 else kept[0]

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """One branch, where it is known which."""
        node.test = self.visit(node.test)
        truth = self.truth(node.test)
        if truth is None:
            return self.generic_visit(node)
        self.changed = True
        new: ast.AST = self.visit(node.body if truth else node.orelse)
        return new

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """One branch, where it is known which."""
        node.test = self.visit(node.test)
        truth = self.truth(node.test)
        if truth is None:
            return self.generic_visit(node)
        self.changed = True
        return self._block(node.body if truth else node.orelse, needed=False)

    def visit_For(self, node: ast.For) -> ast.AST | list[ast.stmt]:
        """A loop over a range that its first round leaves for good is that round."""
        self.generic_visit(node)
        call = ast.unparse(node.iter) if isinstance(node.iter, ast.Call) else ""
        goes_on = any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(node))
        if goes_on or not re.fullmatch(r"range\([1-9]\d*\)", call) or not isinstance(node.body[-1], ENDS):
            return node
        self.changed = True
        return [ast.Assign([node.target], ast.Constant(0)), *node.body]

    def visit_Assert(self, node: ast.Assert) -> ast.AST | None:
        """Nothing, where it holds for certain."""
        self.generic_visit(node)
        return None if self.truth(node.test) else node

    def visit_Match(self, node: ast.Match) -> ast.AST | list[ast.stmt]:
        """The one case of a settings object whose class is known."""
        value = self.knowledge.of(node.subject, self.names)
        if not isinstance(value, Known) or not isinstance(value.value, BaseModel):
            return self.generic_visit(node)
        for case in node.cases:
            fits = isinstance(case.pattern, ast.MatchClass) and self._is_a(value, ast.unparse(case.pattern.cls))
            if fits and isinstance(case.pattern, ast.MatchClass) and not case.pattern.patterns and not case.guard:
                self.changed = True
                return [*_captures(node.subject, case.pattern), *self._block(case.body)]
        return self.generic_visit(node)


def _captures(subject: ast.expr, pattern: ast.MatchClass) -> list[ast.stmt]:
    """`case Class(attribute=name)` as assignments."""
    return [
        ast.Assign([ast.Name(captured.name, ast.Store())], ast.Attribute(subject, attribute, ast.Load()))
        for attribute, captured in zip(pattern.kwd_attrs, pattern.kwd_patterns, strict=True)
        if isinstance(captured, ast.MatchAs) and captured.name
    ]


def _is_unread(statement: ast.stmt, kept: set[str]) -> bool:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value:
        target = statement.target
    else:
        return False
    names = target.elts if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple) else [target]
    unread = all(isinstance(name, ast.Name) and name.id not in kept for name in names)
    return unread and statement.value is not None and is_harmless(statement.value)
