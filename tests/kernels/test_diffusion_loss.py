"""What `diffusion_loss` and `q_sample` read, refuse and let through, beside what all ops are tested for."""

import math

import pytest
import torch

from ditfast.kernels import OPS, BackendError, diffusion_loss, q_sample
from ditfast.kernels._triton import samples

SPECS = {spec.name: spec for spec in OPS}


@pytest.fixture
def inputs(device, generator):
    spec = SPECS["diffusion_loss"]
    return spec.make_inputs(spec.cases[0], torch.float32, device, generator)


@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_velocity_of_a_linear_path_is_data_minus_noise(backend, device, generator):
    x_0, noise, velocity = torch.randn(3, 2, 4, 5, 5, device=device, generator=generator)
    t = torch.rand(2, device=device, generator=generator)
    ones = torch.ones_like(t)
    x_t = q_sample(x_0, noise, t, 1 - t, backend=backend)
    torch.testing.assert_close(x_t, t.view(2, 1, 1, 1) * (x_0 - noise) + noise)
    mse, vb = diffusion_loss(velocity, x_0, noise, ones, -ones, backend=backend)
    torch.testing.assert_close(mse, (velocity - (x_0 - noise)).square().mean((1, 2, 3)))
    assert vb is None


def test_what_a_coefficient_of_zero_multiplies_is_not_read(inputs):
    expected = diffusion_loss(**inputs, backend="triton")
    unread = (inputs["a"] == 0) & (inputs["bound"][:, 4] == 0)
    assert unread.any() and (inputs["b"] == 0).any()
    inputs["x_0"][unread], inputs["noise"][inputs["b"] == 0] = torch.nan, torch.nan
    assert all(map(torch.equal, diffusion_loss(**inputs, backend="triton"), expected))


@pytest.mark.parametrize("channel", (0, -1))
@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_nan_of_a_network_shows_in_the_loss(channel, backend, inputs):
    inputs["output"][:, channel, 0, 0] = torch.nan
    mse, vb = diffusion_loss(**inputs, backend=backend)
    assert vb.isnan().all() and bool(mse.isnan().all()) is (channel == 0)


def test_bins_far_from_the_mean_are_clamped_and_have_no_gradient(inputs):
    del inputs["weight"]
    inputs["bound"][:, 0] = 100.0
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        given = {name: tensor.detach().to(dtype).requires_grad_(name == "output") for name, tensor in inputs.items()}
        _, vb = diffusion_loss(**given, backend=backend)
        vb[::2].sum().backward()
        results.append((vb.detach()[::2].float(), given["output"].grad.float()))
    assert (results[0][1] == 0).float().mean() > 0.9
    # A probability near the clamp is exp(-27): its slope has the rounding of the argument times that.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_slices_of_channels_are_read_in_place_and_other_views_copied(device):
    output = torch.randn(3, 8, 4, 5, device=device)
    for view in (output[:, :4], output[:1].expand(3, 8, 4, 5), output[:, 2:3, 1:2]):
        assert samples(view) is view
    for view in (output.mT, output[..., 1:], output.contiguous(memory_format=torch.channels_last)):
        assert samples(view).is_contiguous() and torch.equal(samples(view), view)


@pytest.mark.parametrize("name", ("x_0", "noise", "a", "b", "bound"))
def test_gradient_of_a_constant_is_for_the_reference(name, inputs, device):
    inputs[name].requires_grad_()
    with pytest.raises(BackendError, match=r"no derivative.*backend='reference'"):
        diffusion_loss(**inputs, backend="triton")
    given = [inputs[name] for name in ("output", "x_0", "noise", "a", "b", "bound")]
    assert SPECS["diffusion_loss"].op.choose("auto", torch.device("cuda"), torch.float32, given) == "reference"
    mse, vb = diffusion_loss(**inputs)
    assert torch.autograd.grad((mse + vb).sum(), inputs[name])[0].abs().sum() > 0
    with torch.no_grad():
        diffusion_loss(**inputs, backend="triton")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    (
        ("output", lambda v: v[:, :-1], "output has 5 channels, expected 6: 2C channels with a bound"),
        ("bound", lambda v: None, "output has 6 channels, expected 3: C channels without a bound"),
        ("bound", lambda v: v[:, :4], r"bound has shape \(33, 4\), expected \(B=33, 5\)"),
        ("a", lambda v: v[:4], r"a has shape \(4\,\), expected \(B=33\)"),
        ("noise", lambda v: v[..., :1], r"noise has shape .* expected \(B=33, C=3, S1=7, S2=9\)"),
        ("x_0", lambda v: v[:, :0], r"x_0 has shape \(33, 0, 7, 9\), expected \(B, C, ...\) with C, ... at least 1"),
        ("b", lambda v: v.int(), "b has dtype torch.int32"),
    ),
)
def test_bad_input_says_what_was_expected(name, change, message, inputs):
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**{**inputs, name: change(inputs[name])})


@pytest.mark.parametrize("logvar", (-72.0, -87.0, -120.0))
@pytest.mark.parametrize("shift", (0.0, 0.003, 0.5))
def test_vanishing_variances_have_no_nan(logvar, shift, device):
    """z^3 is beyond float32, and the likelihood flat: 0 for a mean in the bin, that of the clamp for one outside."""
    x_0 = torch.tensor([-1.0, 0.2, 1.0], device=device).view(1, 3, 1, 1)
    output = torch.cat([x_0 + shift, torch.full_like(x_0, logvar)], dim=1).requires_grad_()
    bound = torch.tensor([[1.0, logvar, 0.0, 1.0, 1.0]], device=device)
    one = torch.ones(1, device=device)
    _, vb = diffusion_loss(output, x_0, x_0, one, 0 * one, bound, backend="triton")
    (grad,) = torch.autograd.grad(vb.sum(), output)
    # The end bins reach to infinity on one side: a mean half the range above lies in that of 1.
    outside = 2 if shift == 0.5 else 0
    expected = torch.full_like(vb, -math.log2(1e-12) * outside / 3)
    torch.testing.assert_close((vb, grad), (expected, torch.zeros_like(grad)))
