"""Strides must not change a bit: transposed, expanded, chunked tensors against contiguous copies of themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast.kernels import OPS, adaln_modulate, attention_qkvpacked, parity
from ditfast.kernels.attention.libraries import aligned

# What an op works on in place must be contiguous, which its own checks see to.
KERNELS = [
    pytest.param(form, id=name)
    for spec in OPS
    if "triton" in spec.op.backends and not spec.mutates
    for name, form in spec.by_form.items()
]


def assert_equal_bits(spec, inputs, douts):
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    results = parity.run(spec, inputs, "triton", douts)
    expected = parity.run(spec, plain, "triton", [dout.contiguous() for dout in douts])
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def odd_inputs(spec, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, device, generator)
    return inputs, parity.random_douts(parity.run(spec, inputs, "reference"), generator)


@pytest.mark.parametrize("spec", KERNELS)
def test_last_dim_not_dense(spec, device, generator):
    inputs, douts = odd_inputs(spec, device, generator)

    def turned(tensor):
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor

    views = {k: turned(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    assert_equal_bits(spec, views, [turned(dout) for dout in douts])


@pytest.mark.parametrize("spec", KERNELS)
@pytest.mark.parametrize("dim", (0, 1, -1))
def test_expanded_inputs_and_gradients(spec, dim, device, generator):
    inputs, douts = odd_inputs(spec, device, generator)

    def expanded(tensor):
        return tensor.narrow(dim, 0, 1).expand_as(tensor) if dim < tensor.ndim else tensor

    assert_equal_bits(spec, inputs, [expanded(dout) for dout in douts])
    assert_equal_bits(spec, {k: expanded(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, douts)


def test_chunks_of_one_modulation_are_read_in_place_and_graded_together(device, generator):
    x = torch.randn(3, 7, 48, device=device, generator=generator)
    modulation = torch.randn(3, 6 * 48, device=device, generator=generator).requires_grad_()
    shift, scale = modulation.chunk(6, dim=1)[3:5]
    y = adaln_modulate(x, shift, scale, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert {t.untyped_storage().data_ptr() for t in saved[1:3]} == {modulation.untyped_storage().data_ptr()}
    y.sum().backward()
    apart = [t.detach().clone().requires_grad_() for t in (shift, scale)]
    adaln_modulate(x, *apart, backend="triton").sum().backward()
    assert torch.equal(modulation.grad[:, 3 * 48 : 5 * 48], torch.cat([t.grad for t in apart], dim=1))
    assert not modulation.grad[:, : 3 * 48].any() and not modulation.grad[:, 5 * 48 :].any()


@pytest.mark.parametrize(
    ("view", "copied"),
    (
        (lambda x: x, False),
        (lambda x: x[:, :, 0:2, 8:24], False),
        (lambda x: x.transpose(1, 2), False),
        (lambda x: x.flatten()[1 : 1 + 2 * 3 * 4 * 8].view(2, 3, 4, 8), True),
        (lambda x: x[..., 1:25], True),
        (lambda x: x[..., :20].contiguous()[..., :16], True),
        (lambda x: x.mT, True),
    ),
)
def test_sdpa_on_a_gpu_is_given_aligned_rows(view, copied, device):
    tensor = view(torch.randn(2, 5, 4, 24, device=device).bfloat16())
    result = aligned(tensor)
    assert torch.equal(result, tensor)
    assert (result.data_ptr() != tensor.data_ptr()) is copied
    assert result.data_ptr() % 16 == 0 and result.is_contiguous() is (copied or tensor.is_contiguous())


def test_sdpa_copies_misaligned_views_on_a_gpu_only(monkeypatch):
    qkv = torch.randn(2, 5, 3, 4, 25)[..., 1:]
    given, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: given.extend(a) or sdpa(*a, **k)
    )
    expected = attention_qkvpacked(qkv, backend="sdpa")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    torch.testing.assert_close(attention_qkvpacked(qkv, backend="sdpa"), expected)
    assert [t.transpose(1, 2).is_contiguous() for t in given] == [False] * 3 + [True] * 3


# Dims of the ops over tokens, of q_sample, diffusion_loss and guided_step.
FAR = ({*"BTD"}, {*"BCHW"}, {*"BCHWK5"}, {*"BCHWKGN"})

INT64_SCRIPT = """
import os, sys, torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from ditfast.kernels import OPS
from ditfast.kernels.spec import Case
spec = next(spec for spec in OPS if spec.name == sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
far = 2**31 + 64
buffer = torch.empty(far + 256, dtype=torch.bfloat16, device=device)
slots = iter(range(0, 256, 64))

def distant(tensor):
    if tensor.ndim < 3:
        return tensor
    # .data: autograd would take the next tensor's copy into the buffer for a change of this one.
    return buffer.as_strided(tensor.shape, (far, *tensor[0].stride()), next(slots)).copy_(tensor).data

def run(place):
    torch.manual_seed(0)
    sizes = {"B": 2, "T": 2, "D": 32, "C": 2, "H": 2, "W": 4, "K": 4, "G": 1, "N": 7}
    inputs = spec.make_inputs(Case("far", sizes), torch.bfloat16)
    inputs = {k: place(v.to(device, torch.bfloat16)) for k, v in inputs.items()}
    graded = [v.requires_grad_() for v in spec.graded(inputs).values()]
    outputs = spec.call(inputs, "triton")
    if not graded:
        return outputs
    douts = [place(torch.randn(out.shape).to(out)) for out in outputs]
    return *outputs, *torch.autograd.grad(outputs, graded, douts)

for result, expected in zip(run(distant), run(lambda tensor: tensor), strict=True):
    assert torch.equal(result, expected)
"""


@pytest.mark.full
@pytest.mark.parametrize("spec", [p for p in KERNELS if {*" ".join(p.values[0].dims.values()).split()} in FAR])
def test_offsets_beyond_31_bits(spec):
    script = [sys.executable, "-c", INT64_SCRIPT, spec.name]
    subprocess.run(script, check=True, timeout=300, cwd=Path(__file__).parents[2])
