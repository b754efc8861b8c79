"""Every backend of every op against a float64 oracle, outputs and gradients, under the two budgets of parity.py."""

import pytest
import torch

from ditfast.kernels import OPS, _rows, parity
from ditfast.kernels.attention.libraries import LIBRARIES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A mixed case has two dtypes, so float32 alone is not one.
MATRIX = [
    pytest.param(
        *(spec, backend, case, dtype),
        id=f"{spec.name}-{backend}-{case.name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.full] if case.full else [],
    )
    for spec in OPS
    for backend in spec.op.backends
    if backend != "reference" and (torch.cuda.is_available() or backend not in LIBRARIES)
    for case in spec.cases
    for dtype in DTYPES
    if not (case.mixed and dtype == torch.float32)
]


@pytest.mark.parametrize(("spec", "backend", "case", "dtype"), MATRIX)
def test_backend_stays_within_both_budgets(spec, backend, case, dtype, device, generator):
    inputs = spec.make_inputs(case, dtype, device, generator)
    if backend in LIBRARIES and (why := spec.op.refusal(backend, torch.device(device), dtype, [*inputs.values()])):
        pytest.skip(why)
    verdicts = parity.check(spec, inputs, backend, generator)
    assert verdicts
    assert all(verdict.ok for verdict in verdicts), [verdict for verdict in verdicts if not verdict.ok]


@pytest.mark.parametrize(
    ("spec", "case"),
    [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in OPS
        if "triton" in spec.op.backends
        for case in spec.cases
        if case.name in ("odd", "tiles")
    ],
)
def test_programs_of_a_full_grid_stay_within_both_budgets(spec, case, device, generator, monkeypatch):
    """On the small grids of the other tests a program takes a tile at most, and its loop would go untested."""
    monkeypatch.setattr(_rows, "MIN_PROGRAMS", 0)
    verdicts = parity.check(spec, spec.make_inputs(case, torch.bfloat16, device, generator), "triton", generator)
    assert all(verdict.ok for verdict in verdicts), [verdict for verdict in verdicts if not verdict.ok]


def test_torch_empty_holds_nan_in_these_tests(device):
    assert torch.empty(3, device=device).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_judge_rejects_nan_and_one_element_off(dtype, device, generator):
    exact = {"out0": torch.randn(64, 64, dtype=torch.float64, device=device, generator=generator)}
    eager = {"out0": exact["out0"].to(dtype)}
    assert all(verdict.ok for verdict in parity.judge(eager, eager, exact))
    for wrong in (torch.nan, 2.0):
        broken = {"out0": eager["out0"].clone()}
        broken["out0"][5, 7] += wrong
        assert not any(verdict.ok for verdict in parity.judge(broken, eager, exact))
