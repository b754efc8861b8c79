"""The probability flow by torchdiffeq, and the likelihood of data."""

import sys

import pytest
import torch

from ditfast.diffusion import ClassifierFreeGuidance, Sampler, create_transport
from ditfast.diffusion.transport import PATHS, PREDICTIONS
from ditfast.diffusion.transport.ode import TORCHDIFFEQ_METHODS

from .conftest import NAMES

pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed: pip install -e '.[dev]'")
DOPRI5 = [name for name in NAMES if "dopri5" in name]
POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name", DOPRI5)
def test_samples_golden(sit_golden, sit_model, name):
    _, path, prediction, _ = name.split("/")
    points = Sampler(create_transport(path, prediction)).sample_ode(num_steps=6)(sit_golden["in/init"], sit_model)
    golden = sit_golden[name]
    assert points.shape == (6, *golden.shape) and torch.equal(points[0], sit_golden["in/init"])
    assert float((points[-1] - golden).abs().max()) <= 1e-9 * float(golden.abs().max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_adaptive_steps_follow_the_flow(gaussian, path, prediction, reverse):
    sampler = Sampler(create_transport(path, prediction))
    data, ends = gaussian(sampler.transport), sampler.transport.interval(sampler.transport.sample_eps)
    solver = sampler.sample_ode(atol=1e-8, rtol=1e-8, reverse=reverse)
    expected = data.flow(POINTS, *(ends[::-1] if reverse else ends))
    torch.testing.assert_close(solver.sample(data, POINTS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", TORCHDIFFEQ_METHODS)
def test_every_method_runs(gaussian, method):
    data = gaussian(create_transport())
    solver = Sampler(data.transport).sample_ode(sampling_method=method, num_steps=200)
    torch.testing.assert_close(solver.sample(data, POINTS), data.flow(POINTS, 0, 1), rtol=0.03, atol=0.03)


def test_the_model_is_told_the_times_that_the_solver_takes():
    class Growing:
        """A model that says t at time t, and only when it is asked on the host."""

        def at_timestep(self, t):
            return lambda x, times: torch.full_like(x, t)

    end = Sampler(create_transport()).sample_ode(num_steps=3).sample(Growing(), torch.zeros(1, 1, dtype=torch.float64))
    assert float(end) == pytest.approx(0.5)


def test_points_are_shifted():
    loop = Sampler(create_transport()).sample_ode(num_steps=5, timestep_shift=0.3)
    points = loop(torch.zeros(1, 1, dtype=torch.float64), lambda x, t: torch.ones_like(x))
    u = torch.arange(5, dtype=torch.float64) / 4
    torch.testing.assert_close(points[:, 0, 0], 0.3 * u / (1 - 0.7 * u))


def test_a_guidance_interval_holds_at_each_evaluation():
    calls = []

    def model(x, t, y):
        calls.append((float(t[0]), len(x)))
        return 0.1 * x

    guided = ClassifierFreeGuidance(model, 2.0, null_class=3, interval=(0.5, 9.0))
    Sampler(create_transport()).sample_ode(num_steps=3)(torch.ones(2, 3), guided, y=torch.zeros(2, dtype=torch.int64))
    assert {n for t, n in calls if t < 0.5} == {2} and {n for t, n in calls if t >= 0.5} == {4}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_likelihood_is_the_density_of_the_data(gaussian, path, prediction):
    sampler = Sampler(create_transport(path, prediction, sample_eps=1e-3))
    data = gaussian(sampler.transport)
    x = torch.linspace(-1, 1.5, 24, dtype=torch.float64).view(4, 2, 3)
    logp, noise = sampler.sample_ode_likelihood(atol=1e-9, rtol=1e-9)(x, data)
    # The flow begins and ends where nothing is infinite: its density is that of x_t there.
    t0, t1 = sampler.transport.interval(1e-3)
    mean, std = data.moments(t1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(noise, data.flow(x, t1, t0), rtol=1e-5, atol=1e-5)
    start, spread = data.moments(t0)
    gap = torch.distributions.Normal(start, spread).log_prob(noise) - torch.distributions.Normal(0, 1).log_prob(noise)
    torch.testing.assert_close(logp, expected - gap.flatten(1).sum(1), rtol=1e-6, atol=1e-6)
    assert float(gap.abs().max()) < 0.03


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_likelihood_of_a_velocity_is_exact(gaussian, path):
    sampler = Sampler(create_transport(path))
    data = gaussian(sampler.transport)
    logp, _ = sampler.sample_ode_likelihood(atol=1e-9, rtol=1e-9)(POINTS, data)
    expected = torch.distributions.Normal(data.mean, data.std).log_prob(POINTS)[:, 0]
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)


def test_hutchinsons_estimate_is_unbiased_for_a_full_jacobian():
    """A velocity A x, of a matrix: log p = log N(z) - trace A, with z = exp(-A) x."""
    matrix = torch.tensor([[0.3, 0.5, -0.2], [0.1, -0.4, 0.6], [-0.3, 0.2, 0.5]], dtype=torch.float64)
    likelihood = Sampler(create_transport()).sample_ode_likelihood(atol=1e-7, rtol=1e-7)
    x = torch.tensor([[0.5, -1.0, 0.7]], dtype=torch.float64)
    signs = torch.cartesian_prod(*3 * [torch.tensor([-2.0, 1.0], dtype=torch.float64)])  # each as likely, of any size
    logp, noise = likelihood.log_density(lambda x, t: x @ matrix.T, x.expand(8, 3), noise_fn=lambda x: signs)
    z = torch.linalg.matrix_exp(-matrix) @ x[0]
    torch.testing.assert_close(noise, z.expand(8, 3), rtol=1e-6, atol=1e-6)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() - matrix.trace()
    torch.testing.assert_close(logp.mean(), expected, rtol=1e-6, atol=1e-6)
    assert float(logp.std()) > 0.1


def test_likelihood_runs_without_gradients_of_its_own():
    net = torch.nn.Linear(3, 3)
    with torch.no_grad():
        logp, noise = Sampler(create_transport()).sample_ode_likelihood(num_steps=2)(
            torch.ones(2, 3).bfloat16(), lambda x, t: net(x)
        )
    assert logp.dtype == noise.dtype == torch.float32 and net.weight.grad is None and not logp.requires_grad


@pytest.mark.parametrize(
    ("path", "prediction", "method", "t"),
    [("GVP", "score", "sample_ode", 0.0), ("VP", "noise", "sample_ode_likelihood", 1.0)],
)
def test_a_singular_end_is_refused_before_it_runs(path, prediction, method, t):
    sampler = Sampler(create_transport(path, prediction, sample_eps=0))
    with pytest.raises(ValueError, match=rf"the drift is infinite or undefined at t = \[{t}\]: take sample_eps > 0"):
        getattr(sampler, method)()


@pytest.mark.parametrize("method", ["sample_ode", "sample_ode_likelihood"])
def test_a_missing_torchdiffeq_is_named_with_its_remedy(monkeypatch, method):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    sampler = Sampler(create_transport())
    with pytest.raises(
        ImportError, match=r"'dopri5' needs torchdiffeq: pip install 'ditfast\[ode\]'.*'euler' or 'heun2'"
    ):
        getattr(sampler, method)()
    assert sampler.sample_ode(sampling_method="heun2").evaluations == 98
