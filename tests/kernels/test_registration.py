"""OPS, the raw ops, torch.compile, autograd, and what importing costs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

import ditfast.kernels as kernels
from ditfast.kernels import OPS, parity
from ditfast.kernels.spec import RawCalls

SPECS = [pytest.param(spec, id=spec.name) for spec in OPS]
KERNELS = [
    pytest.param(form, id=name, marks=[pytest.mark.full] if form is not spec else [])
    for spec in OPS
    if "triton" in spec.op.backends
    for name, form in spec.by_form.items()
]
ROOT = Path(__file__).parents[2]


def test_ops_lists_every_public_op_once():
    names = [spec.name for spec in OPS]
    assert len(set(names)) == len(names)
    assert all(getattr(kernels, spec.name) is spec.fn for spec in OPS)
    files = {path for path in (ROOT / "ditfast/kernels").rglob("*.py") if "SPEC = OpSpec(" in path.read_text()}
    assert {spec.source for spec in OPS} == files


EVERY_ABSENCE = pytest.mark.parametrize("every", (False, pytest.param(True, marks=pytest.mark.full)), ids=("", "every"))


def with_and_without_optional(spec, every):
    """A case with all inputs, and one for every set of absent ones, or only for the largest."""
    firsts = {case.absent: case for case in reversed(spec.cases) if case.absent}
    without = sorted(firsts.values(), key=lambda case: -len(case.absent))
    return spec.cases[0], *(without if every else without[:1])


@pytest.mark.parametrize("spec", KERNELS)
@EVERY_ABSENCE
def test_opcheck(spec, every, device, generator):
    for case in with_and_without_optional(spec, every):
        inputs = spec.make_inputs(case, torch.bfloat16, device, generator)
        graded = spec.op.differentiable
        douts = None if not graded else parity.random_douts(parity.run(spec, inputs, "reference"), generator)
        with RawCalls() as raw:
            parity.run(spec, inputs, "triton", douts)
        assert len(raw.made) == (2 if graded else 1)
        for op, args in raw.made:
            torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, args))


@pytest.mark.parametrize("spec", KERNELS)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.full)))
@EVERY_ABSENCE
@torch._dynamo.config.patch(recompile_limit=64)  # each absence is a graph of its own
def test_compiled_kernels_equal_eager_ones(spec, dynamic, compiler, every, device, generator):
    torch._dynamo.reset()
    call = torch.compile(spec.fn, fullgraph=True, dynamic=dynamic, backend=compiler)
    graphed = type(spec)(**{**vars(spec), "fn": call})
    others = [case for case in spec.cases[3:] if case.strided or spec.mutates]
    for case in (*with_and_without_optional(spec, every), *(others if every else others[:1])):
        inputs = spec.make_inputs(case, torch.float32, device, generator)
        eager = parity.run(spec, inputs, "triton")
        douts = parity.random_douts(eager, generator)
        expected, results = parity.run(spec, inputs, "triton", douts), parity.run(graphed, inputs, "triton", douts)
        for name, result in results.items():
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_without_graph_breaks(spec, device, generator):
    torch._dynamo.reset()
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    graphed = type(spec)(**{**vars(spec), "fn": torch.compile(spec.fn, fullgraph=True, backend="eager")})
    outputs, compiled = spec.call(inputs, "auto"), graphed.call(inputs, "auto")
    torch.testing.assert_close(compiled, outputs, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [param for param in KERNELS if param.values[0].op.differentiable])
def test_second_derivative_is_refused(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    leaf = next(v for v in inputs.values() if isinstance(v, torch.Tensor)).requires_grad_()
    outputs = spec.fn(**inputs, backend="triton")
    first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    (grad,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("spec", SPECS)
def test_minimal_bytes_come_from_the_shapes(spec):
    inputs = spec.make_inputs(spec.bench[0], torch.bfloat16, "meta")
    bytes_min = spec.bytes_min(inputs)
    assert 0 < bytes_min["fwd"] <= bytes_min.get("bwd", math.inf)
    if spec.name == "adaln_modulate":
        rows, modulation, statistics = 256 * 256 * 1152 * 2, 256 * 1152 * 2, 2 * 256 * 256 * 4
        assert bytes_min == {"fwd": 2 * rows + 2 * modulation, "bwd": 3 * rows + 3 * modulation + statistics}
    if spec.flops:
        assert spec.flops(inputs) > 0


IMPORT_SCRIPT = """
import sys, torch
for name in {blocked}:
    sys.modules[name] = None
import ditfast.kernels
x, m = torch.randn(2, 3, 8), torch.randn(2, 8)
assert ditfast.kernels.adaln_modulate(x, m, m).shape == x.shape
try:
    ditfast.kernels.adaln_modulate(x, m, m, backend="triton")
except ditfast.kernels.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("blocked", "says"), ((["triton"], "pip install triton"), ([], "TRITON_INTERPRET=1")), ids=("no triton", "no GPU")
)
def test_import_compiles_nothing(blocked, says, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = IMPORT_SCRIPT.format(blocked=blocked)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert says in done.stdout
    assert not list(tmp_path.iterdir())
