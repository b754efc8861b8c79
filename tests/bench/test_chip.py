"""The ledger of what passed on a chip, and the script that keeps it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import chip

ROOT = Path(__file__).parents[2]
SOURCE = '''"""Doc."""

x = 1  # a comment


def f():
    """More doc."""
    return "# no comment"
'''


def test_comments_docstrings_and_blank_lines_do_not_count():
    assert chip.normalised(SOURCE) == 'x = 1\ndef f():\n    return "# no comment"'


@pytest.mark.parametrize(
    ("old", "new", "same"), (("a comment", "another", True), ("Doc.", "Text.", True), ("x = 1", "x = 2", False))
)
def test_only_code_changes_the_hash(old, new, same, tmp_path):
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(SOURCE)
    after.write_text(SOURCE.replace(old, new))
    hashes = {chip.source_hash(SimpleNamespace(source=path)) for path in (before, after)}
    assert (len(hashes) == 1) is same


def test_an_op_is_stale_until_recorded_and_again_when_its_source_changes(tmp_path):
    path, names = tmp_path / "results" / "chip.json", [spec.name for spec in chip.KERNEL_OPS]
    assert chip.stale(chip.read(path)) == names
    chip.record(names, {"commit": "abc", "gpu": "H200"}, path)
    assert chip.stale(chip.read(path)) == []
    ledger = json.loads(path.read_text())
    assert ledger[names[0]]["commit"] == "abc" and ledger[names[0]]["gpu"] == "H200"
    ledger[names[0]]["hash"] = "0" * 64
    assert chip.stale(ledger) == [names[0]]


def test_recording_one_op_keeps_the_entries_of_others(tmp_path):
    path = tmp_path / "chip.json"
    path.write_text(json.dumps({"other_op": {"hash": "1"}}))
    chip.record([chip.KERNEL_OPS[0].name], {}, path)
    assert set(chip.read(path)) == {"other_op", chip.KERNEL_OPS[0].name}


def tally_of(outcomes: list[tuple[str | None, bool]], torn_down: bool = True) -> chip.Tally:
    """A tally that saw one test per (op, passed)."""
    tally = chip.Tally(first=[], deadline=float("inf"))
    items = []
    for i, (op, _) in enumerate(outcomes):
        params = {"spec": SimpleNamespace(name=op)} if op else {}
        items.append(SimpleNamespace(nodeid=str(i), callspec=SimpleNamespace(params=params)))
    tally.pytest_collection_finish(SimpleNamespace(items=items))
    for i, (_, passed) in enumerate(outcomes):
        tally.pytest_runtest_logreport(SimpleNamespace(nodeid=str(i), failed=not passed, when="call"))
        if torn_down:
            tally.pytest_runtest_logreport(SimpleNamespace(nodeid=str(i), failed=False, when="teardown"))
    return tally


OP = chip.KERNEL_OPS[0].name


@pytest.mark.parametrize(
    ("outcomes", "passed"),
    (
        ([(OP, True), (OP, True), (None, True)], [OP]),
        ([(OP, True), (OP, False), (None, True)], []),
        ([(OP, True), (None, False)], []),
        ([(None, True)], []),
    ),
)
def test_an_op_passes_when_all_its_tests_and_the_general_ones_do(outcomes, passed):
    assert tally_of(outcomes).passed() == passed


def test_an_unfinished_op_does_not_pass():
    assert tally_of([(OP, True)], torn_down=False).passed() == []


def test_tests_after_the_deadline_stop_the_session():
    item = SimpleNamespace(session=SimpleNamespace(shouldstop=False))
    chip.Tally([], deadline=0.0).pytest_runtest_protocol(item)
    assert "out of time" in item.session.shouldstop


SUITE = """
import pytest
from ditfast.kernels import OPS

@pytest.mark.parametrize("dtype", ("one", "two"))
@pytest.mark.parametrize("spec", OPS)
def test_op(spec, dtype):
    assert {passes}

@pytest.mark.full
@pytest.mark.parametrize("spec", OPS)
def test_left_out(spec):
    assert False
"""
RUN = """
import sys
from pathlib import Path
import torch
from bench import chip
torch.cuda.get_device_name = lambda: "a chip"
ledger, suite = map(Path, sys.argv[1:])
chip.run_tests(1, ["-m", "not full"], ledger, suite)
"""


@pytest.mark.parametrize("passes", (True, False))
def test_a_run_enters_the_ops_that_passed(passes, tmp_path):
    suite, ledger = tmp_path / "test_suite.py", tmp_path / "chip.json"
    suite.write_text(SUITE.format(passes=passes))
    subprocess.run([sys.executable, "-c", RUN, str(ledger), str(suite)], cwd=ROOT, check=True, timeout=120)
    recorded = chip.read(ledger)
    assert set(recorded) == ({spec.name for spec in chip.KERNEL_OPS} if passes else set())
    assert all(entry["gpu"] == "a chip" and entry["torch"] for entry in recorded.values())


def run_script(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "bench/gpu.sh", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def test_script_without_a_gpu_says_so_and_leaves_the_ledger():
    before = chip.LEDGER.read_bytes() if chip.LEDGER.exists() else None
    done = run_script("test")
    assert done.returncode == 0 and "no GPU" in done.stdout
    assert (chip.LEDGER.read_bytes() if chip.LEDGER.exists() else None) == before


@pytest.mark.parametrize("args", ((), ("tset",)))
def test_script_refuses_an_unknown_command(args):
    done = run_script(*args)
    assert done.returncode == 2 and "usage" in done.stderr


def test_stale_prints_each_op_that_has_not_run(capsys, monkeypatch):
    monkeypatch.setattr(chip, "read", dict)
    assert chip.main(["stale"]) == 0
    assert capsys.readouterr().out.count("not run on a chip") == len(chip.KERNEL_OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_module_without_a_gpu_says_so(capsys):
    assert chip.main(["test"]) == 0
    assert "no GPU" in capsys.readouterr().out
