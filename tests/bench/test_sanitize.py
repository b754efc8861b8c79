"""compute-sanitizer around the kernels' small cases, by a stand-in for it."""

import shutil
import time

import pytest
import torch

from bench import chip, sanitize

NAMES = [spec.name for spec in chip.KERNEL_OPS]
# Called as the sanitizer is: --tool TOOL --error-exitcode 86 PYTHON -m bench.sanitize --cases OP...
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"{log}"
tool=$2; shift 8
{body}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(body of the stand-in) -> (failed ops, what sanitizer.json holds, the calls)."""

    def run(body: str, seconds: float = 60):
        tool, log, results = (tmp_path / name for name in ("compute-sanitizer", "log", "sanitizer.json"))
        tool.write_text(STAND_IN.format(log=log, body=body))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
        failed = sanitize.sanitize(seconds, results)
        return failed, chip.read(results), log.read_text().splitlines() if log.exists() else []

    return run


def test_what_passes_every_tool_is_kept_with_its_source(run):
    failed, results, calls = run("exit 0")
    assert failed == set() and set(results) == set(NAMES)
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck"]
    for spec in chip.KERNEL_OPS:
        entry = results[spec.name]
        assert entry["passed"] == ["memcheck", "racecheck"] and entry["gpu"] == "a chip"
    assert chip.stale(results) == []


def test_an_op_that_fails_a_tool_is_found_and_left_out(run, capsys):
    failed, results, _ = run(
        f'if [ $tool = racecheck ]; then case " $* " in *" {NAMES[1]} "*) echo race; exit 86;; esac; fi'
    )
    assert failed == {NAMES[1]} and set(results) == set(NAMES) - failed
    assert "race" in (printed := capsys.readouterr().out) and f"racecheck: {NAMES[1]} FAILED" in printed


def test_a_failure_of_all_together_alone_counts_against_all(run):
    failed, results, _ = run("if [ $# -gt 1 ]; then exit 86; fi")
    assert failed == set(NAMES) and results == {}


def test_a_tool_that_cannot_run_is_said_and_passes_nothing(run, capsys):
    failed, results, calls = run("echo no driver; exit 3")
    assert failed == set() and results == {} and len(calls) == 1
    assert "memcheck itself failed" in (printed := capsys.readouterr().out) and "no driver" in printed


def test_out_of_time_keeps_the_tools_that_were_done(run, capsys):
    started = time.monotonic()
    failed, results, _ = run("[ $tool = memcheck ] || exec sleep 60", seconds=4)
    assert time.monotonic() - started < 30
    assert failed == set() and results[NAMES[0]]["passed"] == ["memcheck"]
    assert "no time left for racecheck" in capsys.readouterr().out


def test_without_the_tool_a_line_says_that_it_is_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.sanitize(1, tmp_path / "sanitizer.json") == set()
    assert "skipped" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_tool_is_found_in_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize.find([f"{tmp_path}/cuda*/bin"]) is None
    tool = tmp_path / "cuda-13" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    assert sanitize.find([f"{tmp_path}/cuda*/bin"]) == str(tool)


def test_the_cases_run_both_passes_of_each_op_that_is_named(monkeypatch, device_is_cpu):
    ran = []
    plain = sanitize.parity.run
    monkeypatch.setattr(
        sanitize.parity, "run", lambda spec, *args: ran.append((spec.name, len(args))) or plain(spec, *args)
    )
    assert sanitize.main(["--cases", *NAMES[:2]]) == 0
    assert ran == [(name, count) for name in NAMES[:2] for count in (2, 3)]


@pytest.fixture
def device_is_cpu(monkeypatch):
    """The interpreter in place of a GPU."""
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    make = sanitize.chip.OpSpec.make_inputs
    monkeypatch.setattr(
        sanitize.chip.OpSpec, "make_inputs", lambda self, case, dtype, device, g: make(self, case, dtype, "cpu", g)
    )
