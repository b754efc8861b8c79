"""The ledger of what passed on a chip."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import chip

ROOT = Path(__file__).parents[2]


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


OP = chip.KERNEL_OPS[0].name
OTHER = chip.KERNEL_OPS[1].name


@pytest.fixture
def ledger(tmp_path) -> Path:
    """A ledger in which OP once passed, on "before"."""
    path = tmp_path / "chip.json"
    chip.record([OP], {"gpu": "before"}, path)
    return path


def gpu_of_op(ledger: Path, outcomes: list[tuple[str | None, str]], finished: bool = True, **options) -> str | None:
    """On which chip OP passed, says the ledger after one test per (op, outcome); None where it has no entry."""
    tally = chip.Tally(float("inf"), {"gpu": "now"}, ledger, **options)
    items = []
    for i, (op, outcome) in enumerate(outcomes):
        params = {"spec": SimpleNamespace(name=op)} if op else {}
        items.append(SimpleNamespace(nodeid=str(i), callspec=SimpleNamespace(params=params), outcome=outcome))
    session = SimpleNamespace(items=items)
    tally.pytest_collection_finish(session)
    for item in session.items:
        phases = {"setup": "skipped"} if item.outcome == "skipped" else {"setup": "passed", "call": item.outcome}
        for when, outcome in (phases | ({"teardown": "passed"} if finished else {})).items():
            flags = {name: outcome == name for name in ("passed", "failed", "skipped")}
            tally.pytest_runtest_logreport(SimpleNamespace(nodeid=item.nodeid, when=when, **flags))
    return chip.read(ledger).get(OP, {}).get("gpu")


@pytest.mark.parametrize(
    ("outcomes", "gpu"),
    (
        ([(OP, "passed"), (OP, "passed"), (None, "passed")], "now"),
        ([(OP, "passed"), (OP, "skipped")], "now"),
        ([(OP, "skipped"), (None, "passed")], "before"),
        ([(OP, "passed"), (OP, "failed"), (None, "passed")], None),
        ([(OP, "failed"), (OP, "passed")], None),
        ([(OP, "passed"), (None, "failed")], "before"),
        ([(OP, "passed"), (OTHER, "failed")], "now"),
        ([(None, "passed")], "before"),
    ),
)
def test_an_op_is_entered_when_its_tests_and_the_general_ones_pass_and_taken_out_when_one_fails(ledger, outcomes, gpu):
    assert gpu_of_op(ledger, outcomes) == gpu


def test_tests_by_another_library_are_entered_for_it_alone(ledger):
    before = chip.read(ledger)
    tally = chip.Tally(float("inf"), {"gpu": "now"}, ledger)
    items = []
    for op, backend in (("attention", "triton"), ("attention", "cudnn"), ("attention_qkvpacked", "cudnn")):
        params = {"spec": SimpleNamespace(name=op), "backend": backend}
        items.append(SimpleNamespace(nodeid=f"{op}-{backend}", callspec=SimpleNamespace(params=params)))
    tally.pytest_collection_finish(SimpleNamespace(items=items))
    for nodeid, passed in (("attention-cudnn", True), ("attention_qkvpacked-cudnn", False)):
        for when in ("call", "teardown"):
            report = {"nodeid": nodeid, "when": when, "passed": passed, "failed": not passed}
            tally.pytest_runtest_logreport(SimpleNamespace(**report))
    entered = {name: entry for name, entry in chip.read(ledger).items() if name not in before}
    assert entered == {"attention/cudnn": {"version": torch.__version__, "gpu": "now"}}


def test_an_unfinished_op_is_not_entered(ledger):
    assert gpu_of_op(ledger, [(OP, "passed")], finished=False) == "before"


@pytest.mark.parametrize(("outcome", "gpu"), (("passed", "before"), ("failed", None)))
def test_a_partial_run_enters_nothing_but_takes_out_what_failed(ledger, outcome, gpu):
    assert gpu_of_op(ledger, [(OP, outcome)], enters=False) == gpu


def test_tests_after_the_deadline_stop_the_session():
    item = SimpleNamespace(session=SimpleNamespace(shouldstop=False))
    chip.Tally(0.0, {}).pytest_runtest_protocol(item)
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
from bench import chip, sanitize
torch.cuda.get_device_name = lambda: "a chip"
chip.machine_line = lambda: {"gpu": "a chip", "torch": torch.__version__}
ledger, suite = map(Path, sys.argv[1:3])
sanitize.sanitize = lambda seconds: set(sys.argv[3].split())
sys.exit(chip.run_tests(60, sys.argv[4:], ledger, suite))
"""


def run_suite(ledger: Path, suite: Path, unsafe: str, *arguments: str) -> int:
    """The exit status of run_tests on this suite where the sanitizer rejects one op, or none."""
    command = [sys.executable, "-c", RUN, str(ledger), str(suite), unsafe, *arguments]
    return subprocess.run(command, cwd=ROOT, timeout=120).returncode


@pytest.mark.parametrize(
    ("passes", "arguments", "enters"), ((True, (), True), (False, (), False), (True, ("-k", "one"), False))
)
def test_a_whole_run_enters_the_ops_that_passed(passes, arguments, enters, tmp_path):
    suite, ledger = tmp_path / "test_suite.py", tmp_path / "chip.json"
    suite.write_text(SUITE.format(passes=passes))
    (tmp_path / "pytest.ini").write_text('[pytest]\naddopts = -m "not full"\nmarkers = full\n')
    run_suite(ledger, suite, "", *arguments)
    recorded = chip.read(ledger)
    assert set(recorded) == ({spec.name for spec in chip.KERNEL_OPS} if enters else set())
    assert all(entry["gpu"] == "a chip" and entry["torch"] for entry in recorded.values())


def test_an_op_that_the_sanitizer_rejects_is_taken_out_though_its_tests_pass(tmp_path, ledger):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE.format(passes=True))
    (tmp_path / "pytest.ini").write_text('[pytest]\naddopts = -m "not full"\nmarkers = full\n')
    assert run_suite(ledger, suite, OP) == 1
    assert set(chip.read(ledger)) == {spec.name for spec in chip.KERNEL_OPS} - {OP}


def test_stale_prints_each_op_that_has_not_run(capsys, monkeypatch):
    monkeypatch.setattr(chip, "read", dict)
    assert chip.main(["stale"]) == 0
    assert capsys.readouterr().out.count("not run on a chip") == len(chip.KERNEL_OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_module_without_a_gpu_says_so(capsys):
    assert chip.main(["test"]) == 0
    assert "no GPU" in capsys.readouterr().out
