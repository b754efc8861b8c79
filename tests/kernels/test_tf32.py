"""TF32 on request: the products of every op that has some, its own budget, and the setting that asks for it."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, _gemm, _triton, gelu_mlp, parity
from ditfast.kernels.__main__ import main
from ditfast.kernels.attention import backward, forward, short
from ditfast.kernels.tf32 import dot_precision, tf32_products
from ditfast.kernels.tune import asks, tune

SPECS = {spec.name: spec for spec in OPS if spec.flops and "triton" in spec.op.backends}
CASES = [
    pytest.param(spec, case, id=f"{name}-{case.name}", marks=[pytest.mark.full] * case.full)
    for name, spec in SPECS.items()
    for case in spec.cases
    if not case.mixed
]
MLP, ATTENTION = sys.modules[gelu_mlp.__module__], (backward, forward, short)
# op, modules and function with the bug, the right text, the wrong one
BUGS = (
    ("gelu_mlp", (_gemm,), "multiply", "tl.dot(a_tile, b_tile,",
     "tl.dot(a_tile.to(tl.bfloat16), b_tile.to(tl.bfloat16),"),
    ("gelu_mlp", (MLP,), "_gelu_mlp_fwd_kernel", "gelu(pre), mask", "0.995 * gelu(pre), mask"),
    ("attention", ATTENTION, "_attention_fwd_kernel", "o_row + cols, o / total", "o_row + cols, 0.998 * o / total"),
    ("attention", ATTENTION, "dq_tile", "cols, dq * scale", "cols, 0.99 * dq * scale"),
    ("attention", ATTENTION, "dkdv_tile", "dk_row + cols, dk * scale", "dk_row + cols, 0.995 * dk * scale"),
)  # fmt: skip


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_tf32_stays_within_its_budgets(spec, case, device, generator):
    verdicts = parity.check(spec, spec.make_inputs(case, torch.float32, device, generator), "triton", generator, True)
    assert all(verdict.ok for verdict in verdicts), [verdict for verdict in verdicts if not verdict.ok]


@pytest.mark.parametrize(("name", "modules", "function", "right", "wrong"), BUGS)
def test_planted_bug_is_rejected(name, modules, function, right, wrong, device, generator, plant):
    plant(modules, function, right, wrong, users=(MLP, _gemm))
    spec = SPECS[name]
    inputs = spec.make_inputs(next(c for c in spec.cases if c.name == "odd"), torch.float32, device, generator)
    assert not all(verdict.ok for verdict in parity.check(spec, inputs, "triton", generator, True))


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])
def test_every_product_is_in_tf32_if_asked_and_else_in_none(spec, device, generator):
    """In TF32 an output is outside of float32's budget, in bfloat16 nothing changes."""
    case = next(c for c in spec.cases if c.name == "odd")
    inputs = spec.make_inputs(case, torch.float32, device, generator)
    truth = parity.truth(spec, inputs, generator)
    with tf32_products():
        verdicts = truth.judge("triton")
    assert not verdicts[0].ok
    assert all(verdict.ok for verdict in truth.judge("triton"))
    launches = {}
    for dtype in (torch.float32, torch.bfloat16):
        for asked in (False, True):
            launches[dtype, asked] = recorded(spec, case, dtype, asked)
    assert launches[torch.float32, True] == {"tf32"}
    assert all(found == {"ieee"} for key, found in launches.items() if key != (torch.float32, True))


def recorded(spec, case, dtype, asked):
    """The precisions of the dots that forward and backward launch."""
    from ditfast.kernels.check import launches

    with tf32_products() if asked else nullcontext():
        found = launches(spec, case, dtype)
    return {launch.meta["PRECISION"] for launch in found if "PRECISION" in launch.meta}


@pytest.mark.parametrize("old_name", (True, False))
def test_the_setting_is_pytorchs_by_either_name(old_name):
    matmul = torch.backends.cuda.matmul
    assert dot_precision(torch.float32) == "ieee"
    try:
        if old_name:
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        assert (dot_precision(torch.float32), dot_precision(torch.bfloat16)) == ("tf32", "ieee")
        with tf32_products():
            pass
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


def test_the_block_follows_what_it_inherited():
    """A setting of all of PyTorch's products is still theirs after the block."""
    matmul = torch.backends.cuda.matmul
    try:
        torch.backends.fp32_precision = "ieee"
        with tf32_products():
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "tf32"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"


def test_the_older_name_stays_readable():
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("medium")
        matmul.fp32_precision = "ieee"
        with tf32_products():
            pass
        assert (torch.get_float32_matmul_precision(), matmul.fp32_precision) == ("medium", "ieee")
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


def test_blocks_may_overlap():
    first, second = tf32_products(), tf32_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dot_precision(torch.float32) == "tf32"
    second.__exit__(None, None, None)
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize("name", ("patchify", "gelu_mlp", "attention"))
def test_measured_configs_are_apart(name, tmp_path, device, monkeypatch):
    """What `tune --dtype tf32` measures is what a run in TF32 asks for, and one in IEEE does not."""
    spec = replace(SPECS[name], bench=SPECS[name].cases[:1])
    with tf32_products():
        choices = tune([spec], torch.float32, device=device, measure=lambda runs: [1.0] * len(runs),
                       compiles=lambda kernel, config: False)  # fmt: skip
        keys = {choice.key for choice in choices}
        assert asks(spec, spec.bench[0], torch.float32) == keys
    assert all("tf32" in key for key in keys) and not keys & asks(spec, spec.bench[0], torch.float32)


def test_the_command_tunes_in_tf32(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "ditfast.kernels.__main__.tune", lambda specs, dtype, *rest: asked.append((dtype, dot_precision(dtype))) or ()
    )
    assert main(["tune", "--op", "patchify", "--dtype", "tf32", "--cache", str(tmp_path / "tuned.json")]) == 0
    assert asked == [(torch.float32, "tf32")] and dot_precision(torch.float32) == "ieee"


def test_the_block_leaves_the_setting_as_it_was_and_compiles(device):
    torch._dynamo.reset()
    before = torch.backends.cuda.matmul.fp32_precision
    call = torch.compile(gelu_mlp, fullgraph=True, backend="aot_eager")
    inputs = SPECS["gelu_mlp"].make_inputs(SPECS["gelu_mlp"].cases[0], torch.float32, device)
    outputs = []
    for asked in (False, True):
        if asked:
            with tf32_products():
                outputs += [call(**inputs, backend="triton"), gelu_mlp(**inputs, backend="triton")]
        else:
            outputs += [call(**inputs, backend="triton"), gelu_mlp(**inputs, backend="triton")]
    assert torch.backends.cuda.matmul.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.skipif(not _triton.INSTALLED, reason="needs triton")
@pytest.mark.parametrize(
    ("dtype", "arch", "fast"),
    (
        ("tf32", "sm_80", True),
        pytest.param("tf32", "sm_90", True, marks=pytest.mark.full),
        pytest.param("float32", "sm_90", False, marks=pytest.mark.full),
    ),
)
def test_tensor_cores_multiply_in_tf32_and_not_in_float32(dtype, arch, fast, tmp_path):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ditfast.kernels", "check", "--arch", arch, "--op", "patchify", "--dtype", dtype]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["tf32_dots"] > 0, row["tensor_core"] > 0) for row in rows} == {(fast, fast)}
