"""Golden tensors of the official transport, the model that made them, and a network that knows Gaussian data."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ditfast.diffusion.transport import Transport

GOLDEN = Path(__file__).parents[2] / "golden" / "sit_transport.safetensors"
NAMES = sorted(load_file(GOLDEN))


@pytest.fixture(scope="session")
def sit_golden() -> dict[str, Tensor]:
    """Float64 outputs of the official code; x0 is noise, x1 data, u uniform draws before they are put into a range."""
    return load_file(GOLDEN)


@pytest.fixture
def sit_model():
    """The function in the place of a network, from the golden file's metadata."""

    def model(x, t):
        t = t.view(-1, *(1,) * (x.ndim - 1))
        return 0.3 * x * torch.cos(3 * t) + 0.1 * torch.sin(x) + 0.05

    return model


class GaussianData:
    """Data N(mean, std^2) in every element, for which all predictions and densities are known."""

    mean, std = 0.4, 0.3

    def __init__(self, transport: Transport):
        self.transport = transport

    def moments(self, t) -> tuple[float, float]:
        """Mean and standard deviation of x_t."""
        at = self.transport.at(torch.as_tensor(t, dtype=torch.float64))
        return float(at.alpha * self.mean), math.hypot(float(at.alpha * self.std), float(at.sigma))

    def __call__(self, x, t, **kwargs):
        """What the best network predicts of x (B, ...) at t (B,)."""
        if self.transport.path_type == "VP":
            t = t.clamp(max=1 - 1e-9)  # an adaptive solver looks beyond the end, where a network too says something
        at = self.transport.at(t.view(-1, *(1,) * (x.ndim - 1)))
        away = (x - at.alpha * self.mean) / (at.alpha**2 * self.std**2 + at.sigma**2)
        if self.transport.prediction == "score":
            return -away
        if self.transport.prediction == "noise":
            return at.sigma * away
        data = self.mean + at.alpha * self.std**2 * away
        return at.d_alpha * data + at.d_sigma * at.sigma * away

    def flow(self, x, t0, t1):
        """Where the probability flow takes x from t0 to t1: x keeps its quantile."""
        (m0, s0), (m1, s1) = self.moments(t0), self.moments(t1)
        return m1 + s1 * (x - m0) / s0


@pytest.fixture
def gaussian():
    return GaussianData
