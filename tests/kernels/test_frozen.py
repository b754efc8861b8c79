"""Inputs whose gradient autograd does not ask for: nothing is launched or multiplied for them."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditfast.kernels import OPS, _triton, gelu_backward, swiglu_backward
from ditfast.kernels.spec import RawCalls

SPECS = {spec.name: spec for spec in OPS if getattr(spec.op.kernels, "skips", ())}
MLPS = ("gelu_mlp", "swiglu_mlp")


def backward_of(spec, inputs, wanted, backend="triton"):
    """What takes the gradients of the inputs of these names, again and again."""
    inputs = {k: v.detach().requires_grad_(k in wanted) if torch.is_tensor(v) else v for k, v in inputs.items()}
    (y,) = spec.call(inputs, backend)
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
def test_mlp_does_not_multiply_for_the_second_weight_alone(name):
    """Its gradient needs the activation and dy, and no gradient of the activation."""
    inputs = SPECS[name].make_inputs(SPECS[name].cases[0], torch.float32, "meta")
    with _triton.recording() as recorded:
        backward_of(SPECS[name], inputs, ["w2"])()
    passed, product = recorded[2:]
    assert passed.kernel.__name__ == f"_{name.removesuffix('_mlp')}_backward_kernel"
    gradients = {"dgate_ptr", "dup_ptr"} if name == "swiglu_mlp" else {"grad_ptr"}
    arguments = dict(zip(passed.kernel.arg_names, passed.args, strict=False))
    assert {key for key, value in arguments.items() if value is None} == gradients | {"partial_ptr"}
    assert product.kernel.__name__ == "_gemm_kernel"


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", MLPS)
def test_library_form_computes_nothing_for_frozen_weights(name, recompute, device, generator, monkeypatch):
    """Products, in units of one linear's; what its elementwise pass is given; the sum of fc2's bias."""
    spec, gated = SPECS[name], name == "swiglu_mlp"
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator) | {"recompute": recompute}
    module, passes = sys.modules[spec.fn.__module__], []
    backward = getattr(module, f"{name.removesuffix('_mlp')}_backward")
    monkeypatch.setattr(module, backward.__name__, lambda *args: passes.append(args) or backward(*args))
    unit = spec.flops(inputs) // (3 if gated else 2)
    # products with the pass's results; whether it is run, for gradients of pre, act (in place in SwiGLU's), biases
    expected = {"h": (3, 1, 0) if gated else (2, 1, 0), "w1": (2, 1, 0), "w2": (1, 0, 0), "b1": (1, 1, 1), "b2": None}
    for wanted, counts in expected.items():
        run = backward_of(spec, inputs, [wanted], "gemm")
        passes.clear()
        with FlopCounterMode(display=False) as counter:
            run()
        flops = counter.get_total_flops() // unit
        if counts is None:
            assert (flops, passes) == (0, [])
            continue
        products, graded, biases = counts
        (given,) = passes
        assert flops == products + recompute * (2 if gated else 1), wanted
        *_, pre_gradient, up_gradient, db1, db3 = given if gated else (given[0], given[0], given[3], None)
        assert (pre_gradient is not None) == (up_gradient is not None) == bool(graded), wanted
        assert (db1 is not None, db3) == (bool(biases), None), wanted
        assert gated or (given[2] is not None) == (wanted == "w2")


@pytest.mark.parametrize("name", MLPS)
def test_library_gradients_alone_are_the_same(name, device, generator):
    spec = SPECS[name]
    for case in spec.cases[0], next((c for c in spec.cases if c.name == "no_biases"), spec.cases[1]):
        inputs = spec.make_inputs(case, torch.bfloat16, device, generator)
        names = [*spec.graded(inputs)]
        for name, grad in zip(names, backward_of(spec, inputs, names, "gemm")(), strict=True):
            assert torch.equal(backward_of(spec, inputs, [name], "gemm")()[0], grad), name


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


def test_sums_without_their_columns_are_refused():
    x, b = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match="gelu_backward: dbias is given and grad is None"):
        gelu_backward(None, x, x.clone(), b)
    with pytest.raises(ValueError, match="swiglu_backward: dgate or dup is None, expected both or"):
        swiglu_backward(x, x.clone(), x.clone(), None, None, b, None)
