"""Equal inputs give equal bits, whatever the order in which the programs of a grid run."""

import ast
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, _rows, _triton, parity

KERNELS = [
    pytest.param(form, id=name) for spec in OPS if "triton" in spec.op.backends for name, form in spec.by_form.items()
]


def both_passes(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, device, generator)
    douts = parity.random_douts(parity.run(spec, inputs, "reference"), generator)
    return lambda: parity.run(spec, inputs, "triton", douts)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the order of programs is the interpreter's")
@pytest.mark.parametrize("spec", KERNELS)
@pytest.mark.parametrize("seed", (0, 1))
def test_order_of_programs_does_not_matter(spec, seed, device, generator, monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    run = both_passes(spec, device, generator)
    in_order = run()
    visited = []

    def shuffled(x, y, z):
        order = torch.randperm(builder.grid_dim[0], generator=torch.Generator().manual_seed(seed)).tolist()
        visited.append(order[x])
        type(builder).set_grid_idx(builder, order[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    out_of_order = run()
    assert visited != sorted(visited)
    for name, result in out_of_order.items():
        assert torch.equal(result, in_order[name]), name


@pytest.mark.parametrize("spec", KERNELS)
def test_repeats_give_equal_bits(spec, device, generator):
    run = both_passes(spec, device, generator)
    first = run()
    for _ in range(20 if device == "cuda" else 1):
        for name, result in run().items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("spec", KERNELS)
def test_no_atomics_in_the_source(spec):
    for source in (*spec.sources, *Path(_rows.__file__).parent.glob("_*.py")):
        nodes = ast.walk(ast.parse(source.read_text()))
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not [name for name in attributes if name.startswith("atomic_")]
