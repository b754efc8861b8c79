"""The compile check: every Triton kernel for chips that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, _triton
from ditfast.kernels.check import Row, launches

ROOT = Path(__file__).parents[2]
KERNELS = [spec for spec in OPS if "triton" in spec.op.backends]
pytestmark = pytest.mark.skipif(not _triton.INSTALLED, reason="needs triton")


def run_check(*args: str, **env: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ditfast.kernels", "check", *args]
    return subprocess.run(command, cwd=ROOT, env=plain | env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arch", ("sm_90", pytest.param("sm_80", marks=pytest.mark.full), pytest.param("sm_100", marks=pytest.mark.full))
)
def test_no_kernel_spills_at_the_shapes_of_dit_xl(arch, tmp_path):
    done = run_check("--arch", arch, "--json", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())
    assert {row["op"] for row in rows} == {spec.name for spec in KERNELS}
    assert {row["case"] for row in rows} == {case.name for spec in KERNELS for case in spec.bench}
    for row in rows:
        assert row["arch"] == arch and row["spills"] == 0 and 16 <= row["registers"] <= 255
        assert row["kernel"] in done.stdout


def test_every_kernel_of_a_file_is_launched():
    for spec in KERNELS:
        launched = {launch.kernel.__name__ for launch in launches(spec, spec.bench[0], torch.bfloat16)}
        written = {line.split("(")[0][4:] for line in spec.source.read_text().splitlines() if line.endswith("_kernel(")}
        assert launched == written


def test_under_the_interpreter_it_says_what_is_wrong():
    done = run_check("--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "without TRITON_INTERPRET" in done.stderr


def test_unknown_architecture_is_refused():
    done = run_check("--arch", "sm_12")
    assert done.returncode == 2 and "sm_90" in done.stderr


@pytest.mark.parametrize(("spills", "shared", "ok"), ((0, 232448, True), (4, 0, False), (0, 232449, False)))
def test_a_row_is_ok_without_spills_and_within_shared_memory(spills, shared, ok):
    row = Row("op", "case", "kernel", "sm_90", {}, registers=32, spills=spills, shared_bytes=shared, tensor_core=0)
    assert row.ok is ok
