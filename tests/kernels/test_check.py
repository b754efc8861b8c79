"""The compile check: every Triton kernel for chips that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, _triton, check
from ditfast.kernels.__main__ import main
from ditfast.kernels.check import SHARED_LIMITS, Row, launches

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
        assert 0 <= row["wide_loads"] <= row["loads"] and row["shared_bytes"] <= SHARED_LIMITS[arch]
        assert row["kernel"] in done.stdout
    # Rows of D are read 16 bytes a thread; what is narrow is the tail of 128, and the scalars of a row. Only 16 warps,
    # which the fused backward of 3072 columns needs in order not to spill, leave 8 bytes for each thread.
    norms = [row for row in rows if row["kernel"].startswith("_norm") and row["config"]["num_warps"] < 16]
    assert norms and all(row["wide_loads"] >= 3 for row in norms)


def test_every_kernel_that_is_written_is_launched():
    recorded = [launch for spec in KERNELS for case in spec.bench for launch in launches(spec, case, torch.bfloat16)]
    lines = [line for path in (ROOT / "ditfast/kernels").rglob("*.py") for line in path.read_text().splitlines()]
    written = {line.split("(")[0][4:] for line in lines if line.endswith("_kernel(") and line.startswith("def ")}
    assert {launch.kernel.__name__ for launch in recorded} == written


def test_under_the_interpreter_it_says_what_is_wrong():
    done = run_check("--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "without TRITON_INTERPRET" in done.stderr


def test_unknown_architecture_is_refused():
    done = run_check("--arch", "sm_12")
    assert done.returncode == 2 and "sm_90" in done.stderr


def row(arch: str = "sm_90", spills: int = 0, shared_bytes: int = 0, tensor_core: int = 0, **dots: int) -> Row:
    return Row("op", "case", "kernel", arch, {}, 32, spills, shared_bytes, 4, 2, tensor_core, **dots)


@pytest.mark.parametrize(
    ("arch", "limit"), (("sm_80", 163 * 1024), ("sm_90", 227 * 1024), ("sm_100", 227 * 1024)), ids=lambda v: str(v)
)
def test_a_row_is_ok_without_spills_and_within_the_shared_memory_of_its_chip(arch, limit):
    assert row(arch, shared_bytes=limit).ok
    assert not row(arch, shared_bytes=limit + 1).ok
    assert not row(arch, spills=4).ok


@pytest.mark.parametrize(
    ("arch", "tensor_core", "hgmma", "ok"),
    (
        ("sm_90", 6, 6, True),
        ("sm_90", 6, 5, False),
        ("sm_90", 0, 0, False),
        ("sm_80", 6, 0, True),
        ("sm_80", 0, 0, False),
    ),
)
def test_dots_of_16_bits_must_be_hgmma_on_sm_90_and_on_tensor_cores_elsewhere(arch, tensor_core, hgmma, ok):
    assert row(arch, tensor_core=tensor_core, hgmma=hgmma, dots=3).ok is ok
    assert row(arch, tensor_core=tensor_core, hgmma=hgmma, tf32_dots=3).ok is (tensor_core > 0)
    assert row(arch).ok


SLOW = """
from dataclasses import replace
import torch
from ditfast.kernels import OPS, check
from ditfast.kernels.attention import forward
forward.CONFIGS = ((0, 2, 128, {stays}, 64, 4, 2), (0, 4, 128, 32, 32, 4, 2))
spec = next(spec for spec in OPS if spec.name == "attention")
rows = check.check([replace(spec, bench=spec.bench[:1])], ["sm_90"], torch.{dtype})
print([(row.dots, row.faults) for row in rows if "fwd" in row.kernel])
"""


@pytest.mark.parametrize(
    ("stays", "dtype", "found"),
    ((64, "bfloat16", "[(4, [])]"), (32, "float16", "[(4, ['SLOW DOTS'])]"), (32, "float32", "[(0, [])]")),
)
def test_a_tile_too_small_for_hgmma_is_seen(stays, dtype, found):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = SLOW.format(stays=stays, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.stdout == found + "\n", done.stdout + done.stderr


@pytest.mark.parametrize(("spills", "status"), ((0, 0), (8, 1)))
def test_spills_are_exit_status_1(spills, status, monkeypatch, capsys):
    monkeypatch.setattr(check, "check", lambda specs, archs, dtype: [row(), row(spills=spills)])
    assert main(["check"]) == status
    assert "2 of 4" in capsys.readouterr().out


SPILLING = """
import sys
from dataclasses import replace
from ditfast.kernels import OPS, check
module = sys.modules["ditfast.kernels.adaln_modulate"]
module.BWD_CONFIGS = ((8192, 8, 64, 2),)
spec = replace(OPS[0], bench=OPS[0].bench[:1])
rows = list(check.check([spec], ["sm_90"]))
print([(row.spills > 0, row.ok) for row in rows if "bwd" in row.kernel])
"""


def test_a_tile_too_large_for_the_registers_is_seen_to_spill():
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPILLING], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.stdout == "[(True, False)]\n", done.stdout + done.stderr
