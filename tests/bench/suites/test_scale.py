"""The suite `scale`: two processes, their efficiency, and gradients that were not reduced are refused."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.contest import Settings
from bench.machine import ROOT
from bench.rows import DITFAST, Row
from bench.suites import SMALL, Options
from bench.suites.scale import Ranks, contests, table
from bench.training import TINY, trainer_for
from ditfast.distributed import World

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, rounds=3, seconds=0.5)
(JOB,) = contests(Options(CPU, SMALL))


def test_the_row_of_two_processes():
    (row,) = JOB.measure(SETTINGS)
    extra = row.extra
    assert row.why_not is None and row.ms > 0 and extra["ranks"] == 2
    assert extra["images_per_s"] == pytest.approx(1e3 * 2 * JOB.batch / row.ms)
    assert extra["efficiency"] > 0 and 0 <= extra["communication_share"] < 1 and extra["reduction_ms"] > 0
    assert extra["gradient_bytes"] > 4 * 100_000 and extra["samples"] >= 3


def test_more_ranks_than_gpus_are_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (row,) = replace(JOB, device=torch.device("cuda")).measure(SETTINGS)
    assert row.ms is None and row.extra["absent"] == "2 ranks need as many GPUs, there are 1"


def test_gradients_that_were_not_reduced_are_refused():
    alone = World(0, 1, CPU)
    with trainer_for(TINY, 4, "fp32", alone) as one, trainer_for(TINY, 2, "fp32", alone) as other:
        # The second process's gradients are missing in what this one has.
        wrong = Ranks(World(0, 2, CPU), one, other, 2).wrong()
        assert "the error of" in wrong
        assert Ranks(alone, one, other, 2).wrong() is None


def test_the_table_has_what_the_suite_is_for_and_of_one_rank_none():
    figures = {"images_per_s": 100.0, "efficiency": 0.91, "communication_share": 0.08}
    row = Row("scale", "a ranks 2", DITFAST, "fp32", "4 px", 20.0, extra={"ranks": 2, **figures})
    alone = replace(row, name="a ranks 1", extra=row.extra | {"ranks": 1})
    absent = replace(row, ms=None, extra={"ranks": 8, "absent": "no GPUs"})
    _, *lines = table([row, alone, absent]).splitlines()
    assert [line.split()[-2:] for line in lines[:2]] == [["91%", "8%"], ["-", "-"]]
    assert "no GPUs" in lines[2]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_who_is_stopped_leaves_no_processes(stop, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCH]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert within(60, lambda: len(workers(tmp_path)) == 2)
    finally:
        process.send_signal(stop)
    assert process.wait(30) == (130 if stop != signal.SIGKILL else -stop)
    assert within(20, lambda: not processes(tmp_path))
    assert stop == signal.SIGKILL or not list(tmp_path.glob("ditfast-bench-*"))


LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
from bench import __main__ as bench, limits
from bench.suites import scale
limits.of = lambda device: None
scale.JOBS["small"] = ("tiny", 64, 2, "fp32", (2,))
limits.as_dict = lambda found: None
sys.exit(bench.main(["scale", "--small", "--device", "cpu"]))
"""


def processes(folder: Path) -> list[str]:
    """The command lines of those who run with files in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if entry.name.isdecimal() and str(folder) in line:
            found.append(line)
    return found


def workers(folder: Path) -> list[str]:
    return [line for line in processes(folder) if "torch.distributed.run" not in line]


def within(seconds: float, done) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)
    return done()


@pytest.mark.full
def test_processes_that_fail_say_why():
    with pytest.raises(RuntimeError, match=r"2 ranks ended with 1: (?s:.*)Did you mean 'DiT-XL/2'"):
        replace(JOB, model="DiT-XL2").measure(SETTINGS)
