"""Every tile that attention's tables name compiles clean, also for the head_dims and dtypes that no bench has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast.kernels import _triton
from ditfast.kernels.attention.tiles import head_widths

pytestmark = pytest.mark.skipif(not _triton.INSTALLED, reason="needs triton")
SCRIPT = """
import sys
from dataclasses import replace
import torch
from ditfast.kernels import OPS, check
from ditfast.kernels.spec import Case
spec = next(spec for spec in OPS if spec.name == "attention_qkvpacked")
arch, dtype, *head_dims = sys.argv[1:]
if dtype == "tf32":
    dtype = "float32"
    torch.backends.cuda.matmul.allow_tf32 = True
heads = (48, 24) if dtype == "bfloat16" else (48,)
cases = tuple(
    Case(f"{d}, T = {T}, {N} heads", {"B": 8, "T": T, "N": N, "head_dim": int(d)}, {"num_heads": 16})
    for d in head_dims for N in heads for T in ((200, 1024) if dtype == "bfloat16" else (1000, 1024))
)
rows = list(check.check([replace(spec, bench=cases)], [arch], getattr(torch, dtype)))
assert len(rows) >= 3 * len(head_dims) and all(row.dots for row in rows) is (dtype == "bfloat16")
print(check.table([row for row in rows if not row.ok]))
sys.exit(not all(row.ok for row in rows))
"""


@pytest.mark.full
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "tf32"))
def test_no_tile_spills_or_passes_the_tensor_cores_by(arch, dtype):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    head_dims = (32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 128)
    command = [sys.executable, "-c", SCRIPT, arch, dtype, *map(str, head_dims)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=plain, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    ((32, (32, 0)), (48, (32, 16)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (104, (64, 64)), (128, (128, 0))),
)
def test_head_dim_is_split_without_padding_to_a_power_of_two(head_dim, widths):
    assert head_widths(head_dim) == widths
