"""Golden tensors in float64, the small DiT that made them, and a network that knows the answer for Gaussian data."""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor, nn

from ditfast.diffusion import GaussianDiffusion
from ditfast.reference import DiT


@pytest.fixture(scope="session")
def golden(golden) -> dict[str, Tensor]:
    """The golden tensors, inputs in float64 too."""
    return {name: value.double() if value.is_floating_point() else value for name, value in golden.items()}


@pytest.fixture
def dit(tiny, golden_state) -> nn.Module:
    model = DiT(**tiny)
    model.load_state_dict(golden_state)
    return model.double().eval()


@pytest.fixture
def replay(golden) -> Callable[[Tensor], Tensor]:
    """The golden sampler noise, a draw a step."""
    draws: Iterator[Tensor] = iter(golden["in/sampler_noise"])
    return lambda x: next(draws)


@pytest.fixture
def gaussian_data() -> tuple[float, float]:
    """Mean and standard deviation of data for which the best network is known in closed form."""
    return 0.4, 0.3


@pytest.fixture
def optimal_eps(gaussian_data) -> Callable[[GaussianDiffusion], Callable]:
    """For a process, the network E[noise | x_t] of data N(mean, std**2)."""
    mean, std = gaussian_data

    def make(process):
        bars = dict(zip(process.timestep_map, process.alphas_cumprod, strict=True))

        def model(x, t, **kwargs):
            bar = bars[int(t[0])].to(x.dtype)
            return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * std**2 + 1 - bar)

        return model

    return make
