"""`python -m bench ops` and the same contests under pytest-benchmark, at the smallest sizes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import limits
from bench.rows import Results
from bench.suites import SMALL, Options, ops
from ditfast import hardware
from ditfast.hardware import Ceilings
from ditfast.kernels import OPS

ROOT = Path(__file__).parents[2]
LIMITS = Ceilings(10.0, {"fp32": 0.5}, "measured", "a machine", "2.13")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit status, what was printed)."""
    monkeypatch.setattr(limits, "of", lambda device: LIMITS)

    def run(*arguments):
        return bench.main(["ops", "--small", "--device", "cpu", *arguments]), capsys.readouterr().out

    return run


def test_every_op_is_measured_and_the_table_comes_last(run, tmp_path):
    path = tmp_path / "ops.json"
    status, out = run("--json", str(path))
    results = Results.load(path)
    own = [row for row in results.rows if row.provider == "ditfast"]
    assert status == 0 and {row.extra["op"] for row in own} == {spec.name for spec in OPS}
    assert all(row.ms > 0 and row.peak_bytes >= 0 for row in own)
    assert results.machine["kind"] == "cpu" and results.limits["copy_gbps"] == 10.0
    *_, last, machine = out.splitlines()
    assert last.startswith("adamw_ema fwd") and machine.startswith("on ")


def test_a_wrong_op_ends_in_status_1(run, monkeypatch):
    spec = next(spec for spec in OPS if spec.name == "gate_residual")

    def wrong(*, backend="auto", **inputs):
        return spec.fn(**inputs, backend=backend) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(ops, "OPS", (replace(spec, fn=wrong),))
    status, out = run()
    assert status == 1 and "ditfast refused: " in out


def test_a_suite_goes_on_and_says_what_is_left(run, tmp_path):
    path = str(tmp_path / "ops.json")
    status, out = run("--json", path, "--only", "q_sample", "--seconds", "0")
    assert status == 0 and "out of time: 2 jobs are left; the same command goes on" in out
    run("--json", path, "--only", "q_sample fwd")
    first = Results.load(path).rows
    run("--json", path, "--only", "q_sample")
    assert Results.load(path).rows[: len(first)] == first and len(Results.load(path).rows) == 2 * len(first)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_who_is_stopped_keeps_and_shows_what_was_measured(stop, run, tmp_path, monkeypatch):
    class Stopped:
        job = "ops", "the second", "fp32", "B 2"

        def measure(self, settings):
            signal.raise_signal(stop)

    first, *_ = contests = list(ops.contests(Options(torch.device("cpu"), SMALL)))
    monkeypatch.setattr(ops, "contests", lambda options: [first, Stopped(), *contests[1:]])
    path = tmp_path / "ops.json"
    status, out = run("--json", str(path))
    rows = Results.load(path).rows
    assert status == 130 and out.splitlines()[-1] == f"interrupted after {len(rows)} rows; the same command goes on"
    assert first.name in out and {row.job for row in rows} == {first.job}


def test_a_file_of_another_device_is_left_alone(tmp_path, run, capsys):
    path = tmp_path / "ops.json"
    Results({"device": "H200"}).save(path)
    assert bench.main(["ops", "--small", "--device", "cpu", "--json", str(path)]) == 2
    assert "holds rows of H200" in capsys.readouterr().err and Results.load(path).machine == {"device": "H200"}


def test_every_name_leads_to_a_module():
    for name in (*bench.SUITES.values(), *bench.COMMANDS.values()):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists() or (ROOT / name.replace(".", "/")).is_dir(), name


def test_an_unknown_name_is_told_what_there_is(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["opps"])
    assert "'ops'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "message"), [
    ("--only=(", "expected a regular expression, got '('"), ("--seconds=-1", "expected seconds from 0, got '-1'"),
    ("--seconds=nan", "expected seconds from 0"), ("--device=foo", "expected cpu, cuda or cuda:N, got 'foo'"),
    ("--device=meta", "expected cpu, cuda"), ("--device=cuda:99", "GPUs here, got 'cuda:99'"),
])  # fmt: skip
def test_an_option_that_cannot_be_is_refused(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["ops", "--small", option])
    assert message in capsys.readouterr().err


def test_a_job_that_is_not_there_is_refused(run, capsys):
    assert bench.main(["ops", "--small", "--device", "cpu", "--only", "nosuch"]) == 5
    assert "--only nosuch: no job is of that name; there are adaln_modulate fwd" in capsys.readouterr().err


@pytest.fixture
def under_pytest(tmp_path):
    """under_pytest(*arguments) -> what `pytest bench/test_suites.py --small` printed, where it passed."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("pygal")
    here = replace(LIMITS, machine=limits.limits_name(torch.device("cpu")), torch=torch.__version__)
    hardware.save_measured(here, tmp_path / "ditfast" / "ceilings.json")

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "bench/test_suites.py", "--small", "--device", "cpu", "-q"]
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment = outer | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_pytest_benchmark_writes_compares_and_draws(under_pytest, tmp_path):
    saved, only = tmp_path / "now.json", ("-k", "gate_residual and fwd and not adaln")
    under_pytest(*only, f"--benchmark-json={saved}", f"--benchmark-histogram={tmp_path / 'now'}")
    tree = json.loads(saved.read_text())
    rows = {one["extra_info"]["provider"]: one["extra_info"] for one in tree["benchmarks"]}
    assert set(rows) == {"ditfast", "eager"} and all(row["ms"] > 0 for row in rows.values())
    assert {one["group"] for one in tree["benchmarks"]} == {"ops gate_residual fwd fp32 odd: B 5, T 63, D 48"}
    assert tree["machine_info"]["ditfast"]["kind"] == "cpu"
    assert list(tmp_path.glob("now-*.svg"))
    compared = under_pytest(*only, f"--benchmark-compare={saved}")
    assert compared.count("\ntest_contest[gate_residual fwd") == 2 * len(rows), compared


@pytest.mark.full
def test_pytest_benchmark_has_the_percentiles_of_a_larger_job(under_pytest, tmp_path):
    saved = tmp_path / "now.json"
    under_pytest("--suite", "sample", "-k", "ddim-5", f"--benchmark-json={saved}")
    (one,) = json.loads(saved.read_text())["benchmarks"]
    own = next(row for row in one["extra_info"]["rows"] if row["provider"] == "ditfast")
    found = [1e3 * one["stats"][key] for key in ("min", "median", "max")]
    assert found == pytest.approx([own["ms_p20"], own["ms"], own["ms_p80"]])


@pytest.mark.full
def test_pytest_benchmark_keeps_rows_without_a_time(under_pytest, tmp_path):
    saved = tmp_path / "now.json"
    under_pytest("--suite", "memory", "-k", "none", f"--benchmark-json={saved}")
    found = json.loads(saved.read_text())["benchmarks"]
    rows = [row for one in found for row in one["extra_info"]["rows"]]
    assert rows and all(row["extra"]["bytes_per_token_layer"] > 0 for row in rows)
