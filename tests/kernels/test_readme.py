"""The README's table of ops is the generated one."""

from pathlib import Path

import pytest

from ditfast.kernels import OPS
from ditfast.kernels.__main__ import main
from ditfast.kernels.readme import MARKERS, op_table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_holds_the_generated_table():
    text = README.read_text()
    begin, end = (text.index(marker) for marker in MARKERS)
    table = text[begin + len(MARKERS[0]) : end].strip()
    assert table == op_table(OPS), "paste what `python -m ditfast.kernels table` prints"


def test_the_command_prints_the_table(capsys):
    assert main(["table"]) == 0
    assert capsys.readouterr().out == op_table(OPS) + "\n"


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in OPS])
def test_each_row_has_three_cells(spec):
    (row,) = (line for line in op_table(OPS).splitlines() if line.startswith(f"| `{spec.name}` |"))
    assert row.replace("\\|", "").count("|") == 4 and ", ".join(spec.op.backends) in row
