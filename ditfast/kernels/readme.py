"""The README's table of ops, made from OPS."""

import ast
from collections.abc import Sequence

from .spec import OpSpec

MARKERS = ("<!-- python -m ditfast.kernels table -->", "<!-- end of the table -->")


def op_table(specs: Sequence[OpSpec]) -> str:
    """A markdown table: each op, what it computes, its backends; "auto" goes by their order or by the op's own rule."""
    rows = [(f"`{spec.name}`", summary(spec), ", ".join(spec.op.backends)) for spec in specs]
    return "\n".join(f"| {' | '.join(row)} |" for row in [("op", "computes", "backends"), ("---",) * 3, *rows])


def summary(spec: OpSpec) -> str:
    """The first line of the op's file, which says what it computes."""
    docstring = ast.get_docstring(ast.parse(spec.source.read_text()))
    if not docstring:
        raise ValueError(f"{spec.source} has no docstring; its first line says what {spec.name} computes")
    return docstring.splitlines()[0].rstrip(".:").replace("|", "\\|").replace("*", "\\*")
