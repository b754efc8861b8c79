"""What is particular to the MLPs: what they keep, recompute, autocast, packed weights, TMA, the library form's pass."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditfast.kernels import OPS, BackendError, _gemm, _triton, backend_of, gelu_mlp, parity, swiglu_mlp
from ditfast.kernels._op import Op
from ditfast.kernels.spec import Case
from ditfast.kernels.tf32 import tf32_products

SPECS = {spec.name: spec for spec in OPS if spec.name in ("gelu_mlp", "swiglu_mlp")}
MLPS = [pytest.param(spec, id=name) for name, spec in SPECS.items()]
PASSES = [pytest.param(spec, id=spec.name) for spec in OPS if spec.name in ("gelu_backward", "swiglu_backward")]
BACKENDS = ("triton", "gemm", "reference")


class Made(TorchDispatchMode):
    """The storages made inside."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.storages[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage()), tensor.nbytes
        return out


def kept_bytes(spec, backend, recompute, dtype=torch.bfloat16):
    """Bytes alive after the forward besides inputs and output, per token and column of the wide layer."""
    inputs = spec.make_inputs(next(c for c in spec.cases if c.name == "recompute"), dtype)
    inputs |= {"recompute": recompute}
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor):
            tensor.requires_grad_()
    with Made() as made:
        out = spec.fn(**inputs, backend=backend)
    mine = {t.untyped_storage()._cdata for t in (out, *inputs.values()) if isinstance(t, torch.Tensor)}
    gc.collect()
    alive = sum(size for key, (ref, size) in made.storages.items() if key not in mine and not ref.expired())
    return alive / (inputs["h"][..., 0].numel() * inputs["w1"].shape[0])


@pytest.mark.parametrize("spec", MLPS)
def test_auto_takes_the_library_on_gpu_and_pytorch_on_a_cpu(spec):
    assert [backend_of(spec.name, device, torch.bfloat16) for device in ("cuda", "cpu")] == ["gemm", "reference"]


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_the_backward(spec, backend):
    wide = 1 if spec.name == "gelu_mlp" else 2
    plain = {"gelu_mlp": 2, "swiglu_mlp": 4}[spec.name]
    assert kept_bytes(spec, backend, False) == 2 * (plain if backend == "reference" else wide)
    assert kept_bytes(spec, backend, True) == 0


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_changes_no_bit(spec, backend, device, generator):
    inputs = spec.make_inputs(next(c for c in spec.cases if c.name == "odd"), torch.bfloat16, device, generator)
    douts = parity.random_douts(parity.run(spec, inputs, "reference"), generator)
    kept, redone = (parity.run(spec, inputs | {"recompute": on}, backend, douts) for on in (False, True))
    for name, result in redone.items():
        assert torch.equal(result, kept[name]), name


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype_and_grades_in_the_weights(spec, backend, device, generator):
    inputs = spec.make_inputs(next(c for c in spec.cases if c.name == "odd"), torch.float32, device, generator)
    low = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    douts = parity.random_douts(parity.run(spec, low, "reference"), generator)
    with torch.autocast(device, torch.bfloat16):
        results = parity.run(spec, inputs, backend, douts)
    rounded = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in low.items()}
    exact, eager = parity.oracle(spec, rounded, douts), parity.run(spec, low, "reference", douts)
    assert results["out0"].dtype == torch.bfloat16
    for name in inputs.keys() & {"h", "w1", "w2", "w3", "b1", "b2", "b3"}:
        assert results[f"d{name}"].dtype == torch.float32
    for name, truth in exact.items():
        error, allowed = ((r[name].double() - truth).square().mean().sqrt() for r in (results, eager))
        assert error <= 1.5 * allowed, name


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("backend", ("triton", "gemm"))
def test_a_backward_under_autocast_computes_as_its_forward_did(spec, backend, device, generator):
    inputs = spec.make_inputs(next(c for c in spec.cases if c.name == "odd"), torch.float32, device, generator)
    h = inputs["h"].requires_grad_()
    grads = []
    for on in (False, True):
        y = spec.fn(**inputs, backend=backend)
        with torch.autocast(device, torch.bfloat16, enabled=on):
            grads += torch.autograd.grad(y.sum(), h)
    assert torch.equal(*grads)


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("recompute", (False, True))
def test_library_form_compiles_without_graph_breaks(spec, recompute, device, generator):
    torch._dynamo.reset()
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator) | {"recompute": recompute}
    call = torch.compile(spec.fn, fullgraph=True, backend="aot_eager")
    graphed = type(spec)(**{**vars(spec), "fn": call})
    douts = parity.random_douts(parity.run(spec, inputs, "reference"), generator)
    for backend in ("gemm", "reference"):
        expected, results = parity.run(spec, inputs, backend, douts), parity.run(graphed, inputs, backend, douts)
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", MLPS)
def test_library_form_spends_no_gemm_on_frozen_weights(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    inputs["h"].requires_grad_()
    y = spec.fn(**inputs, backend="gemm")
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == spec.flops(inputs)


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_library_form_on_the_fused_pass_stays_within_both_budgets(spec, dtype, device, generator, monkeypatch):
    choose, took = Op.choose, []

    def on_triton(op, asked, *args):
        took.append(op.name)
        return choose(op, "triton" if op.name.endswith("_backward") else asked, *args)

    monkeypatch.setattr(Op, "choose", on_triton)
    inputs = spec.make_inputs(spec.cases[0], dtype, device, generator)
    verdicts = parity.check(spec, inputs, "gemm", generator)
    assert all(verdict.ok for verdict in verdicts), verdicts
    assert spec.name.replace("mlp", "backward") in took


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("capability", (80, 90))
def test_programs_of_many_tiles_stay_within_both_budgets(spec, capability, device, generator, monkeypatch):
    """By pointers, as an A100 loads, and by TMA; in the other tests a program has one tile."""
    monkeypatch.setattr(_gemm, "capability", lambda device: capability)
    monkeypatch.setattr(_gemm, "multiprocessors", lambda device: 2)
    case = next(case for case in spec.cases if case.name == "tiles")
    with _triton.recording() as recorded:
        spec.call(spec.make_inputs(case, torch.bfloat16, "meta"), "triton")
    assert [(launch.programs, launch.meta["TMA"]) for launch in recorded] == [(2, capability == 90)] * 2
    verdicts = parity.check(spec, spec.make_inputs(case, torch.bfloat16, device, generator), "triton", generator)
    assert all(verdict.ok for verdict in verdicts), verdicts


@pytest.mark.parametrize(("D", "dtype", "by_tma"), (
    (64, torch.bfloat16, True), (68, torch.bfloat16, False), (64, torch.float16, True), (64, torch.float32, False),
))  # fmt: skip
def test_tma_loads_what_it_can_address(D, dtype, by_tma):
    h, w = torch.empty(128, D, dtype=dtype, device="meta"), torch.empty(256, D, dtype=dtype, device="meta")
    assert _gemm.operands(_gemm.SMALL, (h, w.T))[1]["TMA"] is by_tma


@pytest.mark.parametrize("M, N, tiles", (
    (65536, 4608, _gemm.WIDE), (65536, 12288, _gemm.WIDE), (65536, 1152, _gemm.SQUARE), (4608, 1152, _gemm.SQUARE),
    (64, 4608, _gemm.SMALL), (4608, 40, _gemm.SMALL),
))  # fmt: skip
def test_wide_tiles_are_taken_where_they_fill_the_chip(M, N, tiles):
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((M, 64), (64, N)))
    assert _gemm.tiles_for(M, N, a, b) == tiles
    if min(M, N) > 64:
        assert _gemm.tiles_for(M, N, a, b, further=1) == _gemm.SQUARE
        assert _gemm.tiles_for(M, N, a, b, further=2) == _gemm.NARROW
        assert _gemm.tiles_for(M, N, a.float(), b.float()) == _gemm.EXACT
        with tf32_products():
            assert _gemm.tiles_for(M, N, a.float(), b.float()) == _gemm.TF32
            assert _gemm.tiles_for(M, N, a.float(), b.float(), further=1) == _gemm.PLAIN_NARROW


def test_swiglu_reads_the_halves_of_a_packed_weight_in_place(device, generator):
    h, w12, w2 = (torch.randn(*s, device=device, generator=generator) for s in ((2, 5, 16), (48, 16), (16, 24)))
    b12 = torch.randn(48, device=device, generator=generator)
    w12.requires_grad_()
    (w1, w3), (b1, b3) = w12.chunk(2), b12.chunk(2)
    expected = F.linear(F.silu(F.linear(h, w1, b1)) * F.linear(h, w3, b3), w2)
    (truth,) = torch.autograd.grad(expected.sum(), w12)
    for backend in BACKENDS:
        y = swiglu_mlp(h, w1, w3, w2, b1, b3, backend=backend)
        torch.testing.assert_close(y, expected)
        if backend != "reference":
            saved = {t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
            assert w12.untyped_storage().data_ptr() in saved
        torch.testing.assert_close(*torch.autograd.grad(y.sum(), w12), truth, rtol=1e-4, atol=1e-4)


def test_gelu_mlp_is_the_official_one(device, generator):
    shapes = ((3, 4, 8), (32, 8), (32,), (8, 32), (8,))
    h, w1, b1, w2, b2 = (torch.randn(*s, device=device, generator=generator, dtype=torch.float64) for s in shapes)
    pre = h @ w1.T + b1
    act = 0.5 * pre * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)))
    torch.testing.assert_close(gelu_mlp(h, w1, b1, w2, b2), act @ w2.T + b2)


@pytest.mark.parametrize("spec", MLPS)
def test_without_gradients_nothing_is_written_for_a_backward(spec):
    inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, "meta")
    with _triton.recording() as recorded, torch.no_grad():
        spec.call(inputs, "triton")
    assert recorded[0].args[1] is None
    with _triton.recording() as recorded:
        spec.call(inputs, "triton")
    assert recorded[0].args[1] is not None


@pytest.mark.parametrize("spec", PASSES)
def test_the_pass_refuses_what_is_not_contiguous(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    inputs["grad"] = inputs["grad"].T.contiguous().T
    with pytest.raises(ValueError, match=rf"{spec.name}: grad has strides \(1, 63\), expected a contiguous tensor"):
        spec.fn(**inputs)


@pytest.mark.parametrize("spec", MLPS)
@pytest.mark.parametrize("dim", ("D", "F"))
def test_a_width_of_0_is_an_error(spec, dim):
    inputs = spec.make_inputs(Case("none", {"B": 2, "T": 3, "D": 8, "F": 16} | {dim: 0}), torch.float32)
    with pytest.raises(ValueError, match=f"{spec.name}: {dim} is 0, expected at least 1"):
        spec.fn(**inputs)


@pytest.mark.parametrize("spec", MLPS)
def test_gradients_in_float64_are_summed_in_float64(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.float64, device, generator)
    douts = [torch.randn(inputs["h"].shape, dtype=torch.float64, device=device, generator=generator)]
    grads, exact = (parity.run(spec, inputs, backend, douts) for backend in ("gemm", "reference"))
    for name, truth in exact.items():
        torch.testing.assert_close(grads[name], truth, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("spec", MLPS)
def test_one_weight_in_float64_is_refused_by_triton(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.float32, device, generator)
    with pytest.raises(BackendError, match=f"{spec.name}: backend 'triton' cannot run: .*not torch.float64"):
        spec.fn(**inputs | {"w2": inputs["w2"].double()}, backend="triton")
