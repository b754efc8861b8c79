"""The paths' coefficients and the shift of times."""

import pytest
import torch

from ditfast.diffusion.transport import PATHS, PREDICTIONS, shift_timesteps
from ditfast.diffusion.transport.paths import noise_of, velocity_of

T = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_the_coefficients(path):
    t = T.clone().requires_grad_(True)
    at = PATHS[path](t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)
    torch.testing.assert_close(at.score_factor, at.d_alpha / at.alpha * at.sigma**2 - at.sigma * at.d_sigma)
    assert bool((at.turn > 0).all())


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_noise_and_data(path):
    at = PATHS[path](torch.tensor([0.0, 1.0], dtype=torch.float64))
    start = 0.0 if path != "VP" else 6.59e-3  # exp(-5.025): a variance-preserving process starts at almost pure noise
    assert at.alpha.tolist() == pytest.approx([start, 1], abs=2e-5) and at.sigma.tolist() == pytest.approx([1, 0], 3e-5)
    assert at.sigma[1] == 0


def test_sigma_near_data_keeps_its_digits_in_fp32():
    t = torch.tensor([1 - 2.0**-16])
    torch.testing.assert_close(PATHS["VP"](t).sigma.double(), PATHS["VP"](t.double()).sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_tells_velocity_and_noise(path, prediction):
    at = PATHS[path](T)
    x_1, x_0 = torch.randn(2, len(T), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = at.alpha * x_1 + at.sigma * x_0
    velocity = at.d_alpha * x_1 + at.d_sigma * x_0
    pred = {"velocity": velocity, "noise": x_0, "score": -x_0 / at.sigma}[prediction]
    for form, expected in ((velocity_of, velocity), (noise_of, x_0)):
        by_x, by_pred = form(prediction, at)
        torch.testing.assert_close(by_x * x + by_pred * pred, expected)


def test_shift_moves_times_towards_the_noise_below_1():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_timesteps(t, 0.3)
    assert bool((shifted[1:-1] < t[1:-1]).all()) and shifted[[0, -1]].tolist() == [0, 1]
    assert float(shift_timesteps(torch.tensor(0.5), 0.3)) == pytest.approx(0.15 / 0.65)
    torch.testing.assert_close(1 - shifted, shift_timesteps(1 - t, 1 / 0.3))  # with time the other way round
    assert torch.equal(shift_timesteps(t, 1), t)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_shift_must_be_positive(shift):
    with pytest.raises(ValueError, match=r"timestep_shift must be a finite number > 0, got .*; 1 is no shift"):
        shift_timesteps(torch.zeros(1), shift)
