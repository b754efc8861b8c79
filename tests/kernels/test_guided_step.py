"""What is particular to a sampler's step: no derivative, tensors of any rank, NaN under the clamp, what is refused."""

import pytest
import torch

from ditfast.kernels import BackendError, guided_step
from ditfast.kernels.guided_step import SPEC, guide

BACKENDS = ("triton", "reference")


@pytest.fixture
def inputs(device, generator):
    return SPEC.make_inputs(SPEC.cases[0], torch.float32, device, generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_euler_step_of_a_guided_velocity_with_a_dt_for_each_sample(backend, device, generator):
    x, cond, uncond = torch.randn(3, 2, 4, 5, 6, device=device, generator=generator).unbind()
    t, dt = torch.tensor([[0.0, 0.5], [0.25, -0.1]], device=device)
    zeros = torch.zeros_like(t)
    coefficients = torch.stack([zeros + 1, 1 - t, zeros + 1, zeros, dt, zeros], dim=1)
    x_next, data = guided_step(x, cond, uncond[:, :3], None, coefficients, 1.5, backend=backend)
    velocity = torch.cat([(1.5 * cond - 0.5 * uncond)[:, :3], cond[:, 3:]], dim=1)
    torch.testing.assert_close(x_next, x + dt.view(2, 1, 1, 1) * velocity)
    torch.testing.assert_close(data, x + (1 - t).view(2, 1, 1, 1) * velocity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("space", ((), (5,), (3, 2, 4)))
def test_any_number_of_dims(backend, space, device, generator):
    x, cond = torch.randn(2, 3, 4, *space, device=device, generator=generator).unbind()
    coefficients = torch.randn(3, 6, device=device, generator=generator)
    result = guided_step(x, cond, cond[:, :2], x, coefficients, 2.0, backend=backend)
    flat = guided_step(*(v.reshape(3, v.shape[1], 1, -1) for v in (x, cond, cond[:, :2], x)), coefficients, 2.0)
    for tensor, expected in zip(result, flat, strict=True):
        torch.testing.assert_close(tensor, expected.view_as(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp_keeps_nan(backend, inputs):
    inputs["cond"][1, 2, 0, 0] = torch.nan
    for out in guided_step(**inputs, clip=True, backend=backend):
        assert torch.equal(out.isnan().nonzero(), torch.tensor([[1, 2, 0, 0]], device=out.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x0_that_is_not_kept(backend, inputs):
    x_next, x0 = guided_step(**inputs, keep_x0=False, backend=backend)
    assert x0 is None and torch.equal(x_next, guided_step(**inputs, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_predictions_step_an_fp32_x(backend, inputs):
    half = inputs | {name: inputs[name].bfloat16() for name in ("cond", "uncond")}
    wide = half | {name: half[name].float() for name in ("cond", "uncond")}
    if backend == "reference":  # PyTorch mixes bfloat16 in bfloat16, and nothing after that
        mixed = guide(half["cond"], half["uncond"], 4.0)
        wide |= {"cond": mixed.float(), "uncond": None}
    results = zip(guided_step(**half, backend=backend), guided_step(**wide, backend=backend), strict=True)
    for result, expected in results:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=0 if backend == "triton" else 1e-6)


def test_the_kernel_has_no_derivative_and_says_so(inputs):
    inputs["cond"].requires_grad_()
    with pytest.raises(BackendError, match=r"'triton' has no derivative.*torch.no_grad\(\), or pass backend='refer"):
        guided_step(**inputs, backend="triton")
    with torch.no_grad():
        expected = guided_step(**inputs, backend="triton")
    x_next, x0 = guided_step(**inputs)
    torch.testing.assert_close((x_next, x0), expected)
    (grad,) = torch.autograd.grad(x0.sum(), inputs["cond"])
    torch.testing.assert_close(grad[:, 0], (4.0 * inputs["coefficients"][:, 1]).view(-1, 1, 1).expand_as(grad[:, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": lambda v: v[:, :5]}, r"coefficients has shape \(3, 5\), expected \(B, 6\), or \(B, 7\)"),
        (
            {"coefficients": lambda v: v[:, :6]},
            "cond has 8 channels, expected 4 for x of 4 channels and 6 coefficients",
        ),
        ({"cond": lambda v: v[:, :4]}, "cond has 4 channels, expected 8 for x of 4 channels and 7 coefficients"),
        ({"uncond": lambda v: v[:, :0]}, "uncond has 0 channels, expected 1 to 4 guided ones"),
        ({"uncond": lambda v: v.repeat(1, 2, 1, 1)}, "uncond has 6 channels, expected 1 to 4 guided ones; slice it"),
    ],
)
def test_numbers_of_channels_and_coefficients(change, message, inputs):
    ((name, alter),) = change.items()
    with pytest.raises(ValueError, match=message):
        guided_step(**{**inputs, name: alter(inputs[name])})


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels_are_an_error(backend, device):
    nothing = torch.zeros(2, 0, 3, device=device)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0, 3\), expected at least one channel"):
        guided_step(nothing, nothing, None, None, torch.zeros(2, 6, device=device), backend=backend)
