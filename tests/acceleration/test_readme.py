"""The README's example of `accelerate` runs."""

import re
from pathlib import Path

import pytest


def test_the_example_runs(capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.partition("## Other people's models")[2].partition("\n## ")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    assert "transformer_blocks.*.attn1" in capsys.readouterr().out
    assert len(names["report"].taken) == 11
