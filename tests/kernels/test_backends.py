"""Which backend an op takes, what it says when it cannot, and what it says about wrong arguments."""

import inspect
import re

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ditfast.kernels import (
    OPS,
    BackendError,
    _triton,
    adaln_modulate,
    backend_of,
    patchify,
    q_sample,
    unpatchify,
)
from ditfast.kernels._op import Op

SPECS = [pytest.param(spec, id=spec.name) for spec in OPS]
KERNELS = [pytest.param(spec, id=spec.name) for spec in OPS if "triton" in spec.op.backends]
ORDERED = [pytest.param(spec, id=spec.name) for spec in OPS if not spec.op.auto]
PLAIN = [pytest.param(spec, id=spec.name) for spec in OPS if "triton" not in spec.op.backends]
SPECS_BY_NAME = {spec.name: spec for spec in OPS}
SHAPES = [pytest.param(spec, name, id=f"{spec.name}-{name}") for spec in OPS for name in spec.dims]


def small(spec, dtype=torch.float32):
    return spec.make_inputs(spec.cases[0], dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", ORDERED)
def test_auto_takes_the_kernel_on_a_gpu_and_pytorch_on_a_cpu(spec, monkeypatch):
    monkeypatch.setattr(_triton, "INSTALLED", True)
    on_cpu = spec.op.backends[1] if spec.op.kernels else spec.op.backends[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend_of(spec.name, "cuda", dtype) == spec.op.backends[0]
        assert backend_of(spec.name, "cpu", dtype) == on_cpu
    assert backend_of(spec.name, "cuda", torch.float64) == on_cpu


@pytest.mark.parametrize("spec", KERNELS)
def test_call_takes_the_backend_that_backend_of_names(spec, device, monkeypatch):
    launched = []
    monkeypatch.setattr(_triton, "_recorder", launched)
    inputs = tree_map_only(torch.Tensor, lambda v: v.to("meta"), small(spec))
    for backend in ("auto", "reference"):
        spec.fn(**inputs, backend=backend)
        assert backend_of(spec.name, "meta", torch.float32, backend) != "triton" and not launched
    spec.fn(**inputs, backend="triton")
    assert launched


@pytest.mark.parametrize("spec", SPECS)
def test_unknown_backend_names_those_there_are(spec):
    with pytest.raises(BackendError, match=r"'cublas' is not one of 'auto'.*'reference'"):
        spec.fn(**small(spec), backend="cublas")


@pytest.mark.parametrize("spec", PLAIN)
def test_triton_without_a_kernel_names_the_backends_there_are(spec):
    with pytest.raises(BackendError, match=f"{spec.name}: backend 'triton' is not one of 'auto', .*'reference'"):
        spec.fn(**small(spec), backend="triton")


@pytest.mark.parametrize("spec", KERNELS)
def test_triton_on_a_cpu_without_the_interpreter_is_an_error(spec, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        spec.fn(**small(spec), backend="triton")


@pytest.mark.parametrize("spec", KERNELS)
@pytest.mark.parametrize("asked", ("auto", "triton"))
def test_gpu_without_triton_is_an_error_and_no_fallback(spec, asked, monkeypatch):
    if asked == "auto" and spec.op.auto:
        pytest.skip("its auto is a rule of its own, and takes no kernel of ours")
    monkeypatch.setattr(_triton, "INSTALLED", False)
    monkeypatch.setattr(_triton, "IMPORT_ERROR", "libtriton.so: undefined symbol")
    with pytest.raises(BackendError, match="libtriton.so: undefined symbol.*pip install triton"):
        backend_of(spec.name, "cuda", torch.bfloat16, asked)


@pytest.mark.parametrize("spec", KERNELS)
def test_triton_refuses_float64(spec):
    with pytest.raises(BackendError, match="float64"):
        spec.fn(**small(spec, torch.float64), backend="triton")


def test_unknown_op_names_those_there_are():
    with pytest.raises(ValueError, match="no op 'layer_norm'; there are adaln_modulate"):
        backend_of("layer_norm", "cpu", torch.float32)


@pytest.mark.parametrize(("spec", "name"), SHAPES)
def test_wrong_rank_is_named(spec, name):
    inputs = small(spec)
    wrong = inputs[name].reshape(*inputs[name].shape[:-1], 1, 1, inputs[name].shape[-1])
    if (spec.name, name) == ("guided_step", "x") or name in ("h", "x_0"):  # of any number of dims
        wrong = inputs[name].flatten()[0]
    with pytest.raises(ValueError, match=rf"{spec.name}: {name} .*expected"):
        spec.fn(**{**inputs, name: wrong})


@pytest.mark.parametrize(
    ("spec", "name", "dim"),
    [
        pytest.param(spec, name, dim, id=f"{spec.name}-{name}-{dim}")
        for spec in OPS
        for name, dims in spec.dims.items()
        for dim, letter in enumerate(dims.split())
        if letter.isdigit() or sum(other.split().count(letter) for other in spec.dims.values()) > 1
    ],
)
def test_wrong_size_is_an_error_that_names_it(spec, name, dim):
    inputs = small(spec)
    grown = torch.cat([inputs[name], inputs[name].narrow(dim, 0, 1)], dim)
    with pytest.raises(ValueError, match=rf"{spec.name}: .*expected"):
        spec.fn(**{**inputs, name: grown})


@pytest.mark.parametrize(("spec", "name"), SHAPES)
def test_wrong_dtype_is_an_error_that_names_it(spec, name):
    inputs = small(spec)
    wrong = inputs[name].bool() if name in spec.integers else inputs[name].long()
    with pytest.raises(ValueError, match=rf"{spec.name}: {name} has dtype torch"):
        spec.fn(**{**inputs, name: wrong})


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_on_two_devices_are_an_error(spec):
    names = list(spec.dims)
    if len(names) > 1:
        inputs = small(spec)
        with pytest.raises(ValueError, match=f"{spec.name}: {names[-1]} is on meta, the other tensors on cpu"):
            spec.fn(**{**inputs, names[-1]: inputs[names[-1]].to("meta")})


@pytest.mark.parametrize("spec", SPECS)
def test_something_that_is_no_tensor_is_an_error(spec):
    name = next(iter(spec.dims))
    with pytest.raises(ValueError, match=f"{spec.name}: {name} is a list, expected a torch.Tensor"):
        spec.fn(**{**small(spec), name: [1.0]})


# Without its bound, diffusion_loss reads an output of half the channels: no other bound is like none. What is written
# has no neutral value.
NEUTRAL = [
    pytest.param(spec, name, id=p.id)
    for p in SHAPES
    for spec, name in (p.values,)
    if name in spec.optional and name not in ("bound", *spec.mutates, *spec.overwrites)
]


@pytest.mark.parametrize(("spec", "name"), NEUTRAL)
def test_optional_input_may_be_none(spec, name):
    inputs = small(spec)
    if name == "uncond":
        neutral = inputs["cond"][:, : inputs[name].shape[1]]
    else:
        zero = ("noise", "shift", "scale", "b1", "b2", "b3", "q_bias", "k_bias")
        neutral = torch.full_like(inputs[name], name not in zero)
    without, with_neutral = (spec.fn(**{**inputs, name: value}) for value in (None, neutral))
    torch.testing.assert_close(without, with_neutral)


@pytest.mark.parametrize("spec", [p for p in SPECS if "weight" in p.values[0].optional])
def test_unknown_norm_names_those_there_are(spec):
    with pytest.raises(ValueError, match=rf"{spec.name}: norm is 'batch', expected one of 'layer', 'rms'"):
        spec.fn(**{**small(spec), "norm": "batch"})


@pytest.mark.parametrize(("spec", "name"), [p for p in SHAPES if p.values[1] not in p.values[0].optional])
def test_none_for_a_required_tensor_is_an_error_that_names_it(spec, name):
    with pytest.raises(ValueError, match=rf"{spec.name}: .*\b{name}\b.* is (a NoneType|None), expected"):
        spec.fn(**{**small(spec), name: None})


SECOND = [p for p in SHAPES if p.values[1] not in p.values[0].mutates and p.values[1] != next(iter(p.values[0].dims))]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float8_e4m3fn))
@pytest.mark.parametrize(("spec", "name"), SECOND)
def test_triton_refuses_other_floats_beside_its_own(spec, name, dtype):
    inputs = small(spec)
    # An op may want one dtype for all by its own checks, and PyTorch promotes no float8.
    says = rf"not {dtype}|{name} has dtype {dtype}|Promotion for Float8 Types is not supported"
    with pytest.raises((ValueError, RuntimeError), match=says):
        spec.fn(**{**inputs, name: inputs[name].to(dtype)}, backend="triton")


def test_float64_beside_float32_is_the_reference_on_a_gpu(monkeypatch):
    inputs = {name: v.to("meta") for name, v in small(SPECS_BY_NAME["q_sample"]).items()}
    asked = []
    monkeypatch.setattr(Op, "choose", lambda op, backend, device, dtype, rest: asked.append(dtype) or "reference")
    for name in inputs:
        q_sample(**{**inputs, name: inputs[name].double()})
    q_sample(**inputs)
    assert asked == [torch.float64] * 4 + [torch.float32]


@pytest.mark.parametrize("spec", [p for p in SPECS if "out_dtype" in inspect.signature(p.values[0].fn).parameters])
def test_out_dtype_must_be_a_floating_one_that_the_backend_makes(spec):
    for wrong in (torch.int32, "float32"):
        for backend in ("reference", "triton"):
            with pytest.raises(ValueError, match=rf"{spec.name}: out_dtype is .*expected a floating-point torch.dtype"):
                spec.fn(**small(spec), out_dtype=wrong, backend=backend)
    with pytest.raises(BackendError, match="not torch.float64"):
        spec.fn(**small(spec), out_dtype=torch.float64, backend="triton")


@pytest.mark.parametrize(
    ("op", "name"),
    (
        ("adaln_modulate", "eps"),
        ("gate_residual_adaln_modulate", "eps"),
        ("guided_step", "scale"),
        ("diffusion_loss", "weight"),
    ),
)
def test_a_number_that_is_none_is_named(op, name):
    spec = SPECS_BY_NAME[op]
    with pytest.raises(ValueError, match=rf"{op}: {name} is '1', expected a finite number"):
        spec.fn(**{**small(spec), name: "1"}, backend="triton")


def test_no_columns_are_an_error(device):
    x, m = torch.zeros(2, 3, 0, device=device), torch.zeros(2, 0, device=device)
    with pytest.raises(ValueError, match="D is 0, the Triton kernels take 1 to 8192; use backend='reference'"):
        adaln_modulate(x, m, m, backend="triton")


def test_width_beyond_the_kernels_is_an_error(device):
    x, m = torch.zeros(1, 1, 8193, device=device), torch.zeros(1, 8193, device=device)
    with pytest.raises(ValueError, match="D is 8193, the Triton kernels take 1 to 8192; use backend='reference'"):
        adaln_modulate(x, m, m, backend="triton")


@pytest.mark.parametrize(
    ("size", "tokens", "says"), (((6, 5), 6, "multiples of the patch size 2"), ((6, 4), 5, "expected 6"))
)
def test_patchify_refuses_a_wrong_grid(size, tokens, says):
    with pytest.raises(ValueError, match=says):
        patchify(torch.zeros(1, 4, *size), torch.zeros(8, 4, 2, 2), torch.zeros(8), torch.zeros(1, tokens, 8))


@pytest.mark.parametrize(
    ("width", "grid", "says"), ((16, (2, 2), "expected 4"), (15, (2, 3), "multiple of patch_size"))
)
def test_unpatchify_refuses_a_wrong_grid(width, grid, says):
    with pytest.raises(ValueError, match=says):
        unpatchify(torch.zeros(1, 6, width), 2, grid)


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        *(
            (name, {"eps": "x"})
            for name in ("adaln_modulate", "gate_residual_adaln_modulate", "qk_norm_rope", "adamw_ema")
        ),
        *(
            ("timestep_embedding", wrong)
            for wrong in ({"dim": 1}, {"dim": 2.5}, {"max_period": 0}, {"max_period": "x"})
        ),
        *((name, {"recompute": "mlp"}) for name in ("gelu_mlp", "swiglu_mlp")),
        *((name, {"scale": "x"}) for name in ("attention", "attention_qkvpacked", "guided_step")),
        ("qk_norm_rope", {"interleaved": "no"}),
        ("qk_norm_rope", {"num_heads": "2"}),
        ("adamw_ema", {"beta1": None}),
        ("guided_step", {"clip": 1}),
        ("guided_step", {"keep_x0": None}),
        ("diffusion_loss", {"weight": None}),
        ("patchify", {"compute_dtype": "float32"}),
        ("patchify", {"compute_dtype": torch.float8_e4m3fn}),
        ("adamw_ema", {"decays": None}),
        ("adaln_modulate", {"eps": True}),
        ("adaln_modulate", {"eps": float("nan")}),
        ("timestep_embedding", {"max_period": float("nan")}),
        ("timestep_embedding", {"max_period": float("inf")}),
        ("unpatchify", {"grid": 4}),
        ("unpatchify", {"grid": (2.0, 3)}),
        ("unpatchify", {"patch_size": 0}),
    ),
)
def test_an_argument_of_the_wrong_kind_is_named_with_what_was_given(name, wrong):
    spec = next(spec for spec in OPS if spec.name == name)
    ((argument, value),) = wrong.items()
    with pytest.raises(
        ValueError, match=rf"^{name}: .*{argument} is {re.escape(repr(value))}|^{name}: . of grid is 2.0"
    ):
        spec.fn(**{**spec.make_inputs(spec.cases[0], torch.float32), **wrong})
