"""Inputs whose gradient autograd does not ask for: nothing is launched or multiplied for them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditfast.kernels import OPS, _triton
from ditfast.kernels.spec import RawCalls

SPECS = {spec.name: spec for spec in OPS if getattr(spec.op.kernels, "skips", ())}
MLPS = ("gelu_mlp", "swiglu_mlp")


def backward_of(spec, inputs, wanted):
    """What takes the gradients of the inputs of these names, by Triton, again and again."""
    inputs = {k: v.detach().requires_grad_(k in wanted) if torch.is_tensor(v) else v for k, v in inputs.items()}
    (y,) = spec.call(inputs, "triton")
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return lambda: torch.autograd.grad(y, [inputs[name] for name in wanted], dy, retain_graph=True)


def test_ops_of_weights_skip_them():
    assert {*MLPS, "patchify"} <= SPECS.keys()


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])
def test_a_gradient_alone_is_the_same_bits(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, device, generator)
    names = [*spec.graded(inputs)]
    for name, grad in zip(names, backward_of(spec, inputs, names)(), strict=True):
        (alone,) = backward_of(spec, inputs, [name])()
        assert torch.equal(alone, grad), name


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", MLPS)
def test_mlp_launches_nothing_for_frozen_weights(name, recompute, device, generator):
    spec = SPECS[name]
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator) | {"recompute": recompute}
    # The fused pass, and a GEMM for each matrix or a sum for each bias; a bias of fc2 has two sums and no pass.
    redone = recompute * (1 if name == "gelu_mlp" else 2)
    for wanted, launches in {"h": 2, "w1": 2, "w2": 2, "b1": 2, "h w2": 3, "h w1 w2 b1": 5}.items():
        with _triton.recording() as recorded:
            backward_of(spec, inputs, wanted.split())()
        backward = recorded[2:]
        assert len(backward) == launches + redone, (wanted, [launch.kernel.__name__ for launch in backward])
    with _triton.recording() as recorded:
        backward_of(spec, inputs, ["b2"])()
    assert [launch.kernel.__name__ for launch in recorded[2:]] == ["_column_sums_kernel", "_sum_partials_kernel"]


@pytest.mark.parametrize("name", MLPS)
def test_mlp_writes_nothing_for_frozen_weights(name):
    inputs = SPECS[name].make_inputs(SPECS[name].cases[0], torch.float32, "meta")
    for wanted, written in (("h", False), ("h w2", True)):
        with _triton.recording() as recorded:
            backward_of(SPECS[name], inputs, wanted.split())()
        fused = next(launch for launch in recorded if "bwd" in launch.kernel.__name__)
        arguments = dict(zip(fused.kernel.arg_names, fused.args, strict=False))
        assert (arguments["act_ptr"] is not None, arguments["partial_ptr"]) == (written, None)


def test_patchify_multiplies_for_no_image_that_wants_no_gradient(device, generator):
    spec = SPECS["patchify"]
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    counts = {}
    for wanted in ("weight bias", "bias pos_embed", "x weight"):
        with RawCalls() as raw:
            backward_of(spec, inputs, wanted.split())()
        func, args = raw.made[-1]
        grads = [grad if want else None for grad, want in zip(func(*args), args[-1], strict=True)]
        # Directly, since a mode does not see into a raw op.
        with FlopCounterMode(display=False) as counter:
            spec.op.kernels.bwd(grads, *args[:-1])
        counts[wanted] = counter.get_total_flops() / spec.flops(inputs)
    assert counts == {"weight bias": 1, "bias pos_embed": 0, "x weight": 2}
