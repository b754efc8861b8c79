"""The hash of an op's source: whether what a GPU once ran or measured is still what it would run."""

import ast
import hashlib
import io
import tokenize
from functools import cache
from pathlib import Path

# What an op's file imports but no launch depends on.
_TOOLS = {"spec", "autotune", "peers", "_checks", "_interpreter", "dispatch", "libraries"}


def source_hash(path: Path) -> str:
    """sha256 over an op's file and what it imports of this package, without comments and docstrings."""
    sources, todo = dict[Path, str](), [path]
    while todo:
        file = todo.pop()
        sources[file] = file.read_text()
        todo += _imported(file, sources[file]) - sources.keys()
    return hashlib.sha256("\n".join(normalised(text) for _, text in sorted(sources.items())).encode()).hexdigest()


@cache
def _imported(file: Path, source: str) -> set[Path]:
    """The files of this package that a module imports by `from ._op import Op` or `from . import _op`; no tools."""
    found = set[Path]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {node.module} if node.module else {alias.name for alias in node.names}
            found |= {file.parents[node.level - 1] / f"{name}.py" for name in names - _TOOLS}
    return {path for path in found if path.exists()}


@cache
def normalised(source: str) -> str:
    """The source without docstrings, comments and blank lines, none of which a chip can notice.

    By positions in the text, not by unparsing: the hash must not depend on the version of Python.
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
