"""What Python does not need: annotations that nobody reads, docstrings, abstract methods."""

import ast

# Functions with these words among their decorators hand their text to somebody (Triton's compiler), or the names and
# annotations of their parameters (the schemas of operators).
TEXT_READ = ("triton",)
READ_BY_OTHERS = (*TEXT_READ, "custom_op")
ANY_TYPE = ast.Name("int", ast.Load())


def read_by_others(function: ast.AST, words: tuple[str, ...] = READ_BY_OTHERS) -> bool:
    """Whether annotations and names of parameters of a function, or all of its text, are part of what it means."""
    decorators = " ".join(ast.unparse(decorator) for decorator in getattr(function, "decorator_list", ()))
    return any(word in decorators for word in words)


class Strip(ast.NodeTransformer):
    """Strips a statement. `typed`: names of classes whose annotations are read, such as those of pydantic."""

    def __init__(self, typed: set[str]) -> None:
        self.typed = typed

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        """No annotations but where others read them."""
        if any(ast.unparse(decorator).startswith("abstractmethod") for decorator in node.decorator_list):
            return None
        if not read_by_others(node):
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Fields keep an annotation, but any will do."""
        node.body = _without_docstring(node.body)
        node.bases = [base for base in node.bases if not ast.unparse(base).startswith(("ABC__", "Protocol__"))]
        if node.name not in self.typed:
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    part.annotation = ANY_TYPE
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    return kept or [ast.Pass()]


class Plain(ast.NodeTransformer):
    """Annotated assignments as plain ones, but for those in class bodies and in functions whose text others read."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """To Triton an annotation says what is known when a kernel is compiled."""
        return node if read_by_others(node, TEXT_READ) else self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Only its methods."""
        node.body = [part if isinstance(part, ast.AnnAssign) else self.visit(part) for part in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """Nothing, where nothing is assigned."""
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else ast.Pass()
