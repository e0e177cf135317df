"""Changes to the code that jinja generates for a chat template, so that every operation is counted.

Loops and literals get a filter of the counting environment; `~`, `+` and slices become calls of its methods.
"""

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator

LOOP, LITERAL = "_ticked", "_small"
"""Names of the filters around a loop's iterable, and around new lists, tuples and objects."""


def watched(source: nodes.Template) -> nodes.Template:
    """Insert the filters into a parsed template, and return it."""
    for loop in list(source.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, LOOP, [], [], None, None, lineno=loop.lineno)
    return _Literals().visit(source)


class Generator(CodeGenerator):
    """A code generator that compiles `~`, `+` and slices to calls of the environment.

    jinja's sandbox does not intercept `~` and slices. `+` is frequent, and our call is faster than the sandbox's.
    """

    def visit_Add(self, node: nodes.BinExpr, frame: Any) -> None:
        parts: list[Any] = [node.right, node.left]
        while isinstance(parts[-1], nodes.Add):  # a + b + c in one call
            first = parts.pop()
            parts += [first.right, first.left]
        self.write("environment.added((")
        for part in reversed(parts):
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            self.visit(part, frame) if part is not None else self.write("None")
        self.write(")")


class _Literals:
    """A visitor that puts `_small` around every list, tuple and object that an expression creates."""

    def visit(self, node: Any) -> Any:
        for name, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = [self.visit(item) if isinstance(item, nodes.Node) else item for item in value]
            elif isinstance(value, nodes.Node):
                setattr(node, name, self.visit(value))
        makes = isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        return nodes.Filter(node, LITERAL, [], [], None, None, lineno=node.lineno) if makes else node
