"""The hash of an op's source: only code counts, and all the code that a launch depends on."""

import pytest

from ditfast.kernels import OPS, _op
from ditfast.kernels._source import normalised, source_hash

SOURCE = '''"""Doc."""

x = 1  # a comment


def f():
    """More doc."""
    return "# no comment"
'''


def test_comments_docstrings_and_blank_lines_do_not_count():
    assert normalised(SOURCE) == 'x = 1\ndef f():\n    return "# no comment"'


@pytest.mark.parametrize(
    ("old", "new", "same"), (("a comment", "another", True), ("Doc.", "Text.", True), ("x = 1", "x = 2", False))
)
def test_only_code_changes_the_hash(old, new, same, tmp_path):
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(SOURCE)
    after.write_text(SOURCE.replace(old, new))
    assert (source_hash(before) == source_hash(after)) is same


@pytest.mark.parametrize(
    ("module", "counts"), (("_op", True), ("_rows", True), ("other_op", False), ("autotune", False))
)
def test_what_an_op_imports_counts_too_but_no_tools(module, counts, tmp_path):
    (tmp_path / "op.py").write_text("from . import _rows\nfrom ._norm import norm\nfrom .autotune import pick\n")
    (tmp_path / "_norm.py").write_text("from ._op import Op\nimport torch\n")
    for name in ("_op", "_rows", "other_op", "autotune"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    before = source_hash(tmp_path / "op.py")
    (tmp_path / f"{module}.py").write_text("x = 2\n")
    assert (source_hash(tmp_path / "op.py") != before) is counts


def test_a_package_counts_what_it_imports_of_itself_and_from_above(tmp_path):
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "__init__.py").write_text("from . import forward\n")
    (tmp_path / "op" / "forward.py").write_text("from .._op import Op\n")
    (tmp_path / "_op.py").write_text("x = 1\n")
    before = source_hash(tmp_path / "op" / "__init__.py")
    (tmp_path / "_op.py").write_text("x = 2\n")
    assert source_hash(tmp_path / "op" / "__init__.py") != before


def test_ops_of_one_package_have_hashes_of_their_own():
    assert len({source_hash(spec.source) for spec in OPS}) == len({spec.source for spec in OPS})
    assert (OPS[0].source.parent / "_op.py").samefile(_op.__file__)
