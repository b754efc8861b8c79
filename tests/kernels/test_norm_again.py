"""The norm of a kept stream, made again: the bits that the op had which wrote the stream."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, _triton, autotune
from ditfast.kernels.gate_residual_adaln_modulate import norm_again

SPEC = next(spec for spec in OPS if spec.name == "gate_residual_adaln_modulate")
CASES = [pytest.param(c, id=c.name, marks=[pytest.mark.full] * c.full) for c in SPEC.cases]
TILES = ("BLOCK_T", "ROWS", "MAIN", "TAIL", "num_warps")
# Every reduction of both kernels, its tensor and how that lies in the threads, by which its order is fixed.
REDUCTIONS = """
import re, sys, torch
from ditfast.kernels import _triton, check
from tests.kernels.test_norm_again import both

def reductions(launch):
    code = check._compile(launch, sys.argv[1]).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (#ttg.*)$", code, re.M))
    found = re.findall(r'"tt.reduce".*?: \\(tensor<(\\S+), (#\\w+)>\\)', code, re.S)
    return [(shape, layouts[layout]) for shape, layout in found]

for D in (384, 1152):
    for stream in (torch.bfloat16, torch.float32):
        first, second = map(reductions, both(stream, D))
        assert len(first) == 4 and first == second, (D, stream, first, second)
"""


def both(stream, D, B=32, T=256):
    """The launches of the op and of the norm alone, of a stream in this dtype and the rest in bfloat16."""
    x, branch = (torch.empty(B, T, D, dtype=dtype, device="meta") for dtype in (stream, torch.bfloat16))
    gate, shift, scale = torch.empty(B, 6 * D, dtype=torch.bfloat16, device="meta").chunk(6, dim=1)[:3]
    with _triton.recording() as recorded, torch.no_grad():
        SPEC.fn(x, branch, gate, shift, scale, out_dtype=torch.bfloat16, backend="triton")
        options = (branch.dtype, gate.dtype, 1e-6, "layer", torch.bfloat16)
        norm_again(x, shift, scale, None, *options, backend="triton")
    return recorded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_y_is_the_ops(case, backend, device, generator):
    inputs = SPEC.make_inputs(case, torch.bfloat16, device, generator)
    x_new, y = SPEC.call(inputs, backend)
    dtypes = [None if inputs[name] is None else inputs[name].dtype for name in ("branch", "gate")]
    options = (inputs.get("eps", 1e-6), inputs.get("norm", "layer"), y.dtype)
    vectors = (inputs[name] for name in ("shift", "scale", "weight"))
    assert torch.equal(norm_again(x_new, *vectors, *dtypes, *options, backend=backend), y)


@pytest.mark.parametrize("D", (48, 384, 768, 1152, 3072))
@pytest.mark.parametrize("stream", (torch.bfloat16, torch.float32), ids=str)
def test_tiles_are_the_ops_pinned_or_measured(stream, D):
    with autotune.asking() as asked:
        first, second = both(stream, D)
    assert all(first.meta[name] == second.meta[name] for name in TILES)
    ((key, pinned),) = asked.items()
    with autotune.trying(key, tuple(2 * number for number in pinned)):
        first, second = both(stream, D)
    assert all(first.meta[name] == second.meta[name] for name in TILES)
    assert first.meta["num_warps"] == 2 * pinned[-1]


@pytest.mark.skipif(not _triton.INSTALLED, reason="needs triton")
@pytest.mark.parametrize("arch", ("sm_90", *(pytest.param(a, marks=pytest.mark.full) for a in ("sm_80", "sm_100"))))
def test_a_gpu_adds_in_the_same_order(arch):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", REDUCTIONS, arch]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
