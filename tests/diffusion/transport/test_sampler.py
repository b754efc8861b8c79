"""Fixed steps of the ODE and the SDE: golden samples, orders, moments, and what a loop tells its model."""

import itertools
import math

import pytest
import torch

from ditfast import kernels
from ditfast.diffusion import ClassifierFreeGuidance, Sampler, TwoNetworkGuidance, create_transport
from ditfast.diffusion.transport import DIFFUSION_FORMS, PATHS, PREDICTIONS, loops

from .conftest import NAMES

FIXED = [name for name in NAMES if name.startswith(("ode/", "sde/")) and "dopri5" not in name]
FULL = pytest.mark.full
FAMILY = list(itertools.product(PATHS, PREDICTIONS))


def sampler(*arguments, **options) -> Sampler:
    return Sampler(create_transport(*arguments, **options))


def close(value, golden) -> bool:
    return float((value - golden).abs().max()) <= 1e-12 * float(golden.abs().max())


@pytest.mark.parametrize("name", FIXED)
def test_samples_golden(sit_golden, sit_model, name):
    kind, path, prediction, *form, solver = name.split("/")
    make, draws = sampler(path, prediction), iter(sit_golden["in/sde_noise"])
    if kind == "ode":
        loop = make.sample_ode(sampling_method=solver.removesuffix("_6"), num_steps=6)
    else:
        method, last, _ = solver.split("_")
        last = None if last == "None" else last
        loop = make.sample_sde(sampling_method=method, diffusion_form=form[0], last_step=last, num_steps=6)
    assert close(loop.sample(sit_model, sit_golden["in/init"], noise_fn=lambda x: next(draws)), sit_golden[name])
    assert len(list(draws)) == (8 if kind == "ode" else 3)


@pytest.mark.parametrize(("path", "prediction"), FAMILY)
@pytest.mark.parametrize(
    ("method", "order", "reverse"),
    [("euler", 1, False), ("heun2", 2, False), ("heun2", 2, True), pytest.param("euler", 1, True, marks=FULL)],
)
def test_order_of_the_ode(gaussian, path, prediction, method, order, reverse):
    make = sampler(path, prediction, train_eps=0.02, sample_eps=0.02)
    data = gaussian(make.transport)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    expected = data.flow(start, *make.transport.interval(0.02)[:: -1 if reverse else 1])
    errors = []
    for steps in (100, 200):
        loop = make.sample_ode(sampling_method=method, num_steps=steps + 1, reverse=reverse)
        errors.append(float((loop.sample(data, start) - expected).norm()))
    assert errors[1] < 0.01 * float(expected.norm()) and math.log2(errors[0] / errors[1]) == pytest.approx(
        order, abs=0.2
    )


def sde_moments(loop, data, start):
    """Exact mean and standard deviation of an SDE's samples, for a network that is affine in x.

    Each step is then affine in x and its noise, so that one sample for each noise tells all, without any chance.
    """
    steps = sum(len(times) for times in loop._times) + 2
    draws = iter(torch.eye(steps, dtype=torch.float64)[2:, :, None])
    x = torch.zeros(steps, 1, dtype=torch.float64)
    x[1] = 1
    base, slope, *spread = loop.sample(data, x, noise_fn=lambda x: next(draws))[:, 0].tolist()
    mean, std = start
    return base + (slope - base) * mean, math.hypot((slope - base) * std, *(s - base for s in spread))


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("Linear", "velocity"), ("GVP", "score")] + [pytest.param(*pair, marks=FULL) for pair in FAMILY],
)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_every_diffusion_form_samples_the_data(gaussian, path, prediction, form, method):
    make = sampler(path, prediction)
    data = gaussian(make.transport)
    errors = []
    for steps in (100, 200):
        loop = make.sample_sde(
            sampling_method=method, diffusion_form=form, num_steps=steps, last_step="Euler", last_step_size=5 / steps
        )
        mean, std = sde_moments(loop, data, (0, 1))
        assert mean == pytest.approx(data.mean, abs=0.05)
        errors.append(abs(std / data.std - 1))
    assert errors[1] < 0.06 and errors[1] < max(0.75 * errors[0], 0.01)


def test_the_score_counts_in_the_sde(gaussian):
    """Of noise without its drift the samples would be wider, of the drift without noise narrower."""
    make = sampler()
    std = sde_moments(make.sample_sde(diffusion_form="constant", last_step="Tweedie"), gaussian(make.transport), (0, 1))
    strong = make.sample_sde(diffusion_form="constant", diffusion_norm=4.0, num_steps=1000, last_step="Tweedie")
    assert sde_moments(strong, gaussian(make.transport), (0, 1)) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("steps", [10, 250])
def test_sbdm_of_a_velocity_begins_with_a_step_of_the_ode(sit_model, path, method, steps):
    make = sampler(path)
    loop = make.sample_sde(sampling_method=method, diffusion_form="SBDM", num_steps=steps)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second, *_ = loop(x, sit_model)
    size = float(0.96 / (steps - 1))
    slope = sit_model(x, torch.zeros(2, dtype=torch.float64))
    expected = x + size * slope
    if method == "Heun":
        expected = x + size / 2 * (slope + sit_model(expected, torch.full((2,), size, dtype=torch.float64)))
    torch.testing.assert_close(first, expected)
    assert loop.timesteps[0] == 0 and bool(second.isfinite().all()) and not torch.equal(second, first)


@pytest.mark.parametrize("form", ["constant", "increasing-decreasing"])
def test_the_forms_that_are_broken_officially(form):
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    w = DIFFUSION_FORMS[form](t, PATHS["Linear"](t), 2.0)
    torch.testing.assert_close(w, torch.tensor([2.0, 2, 2, 2] if form == "constant" else [0, 1.0, 2, 0]).double())


def test_the_network_is_evaluated_once_a_step(sit_model):
    calls = []

    def model(x, t):
        calls.append(float(t[0]))
        return sit_model(x, t)

    make, x = sampler(), torch.zeros(1, 2)
    for loop, expected in (
        (make.sample_sde(num_steps=5), 5),
        (make.sample_sde(num_steps=5, last_step=None, diffusion_form="sigma"), 4),
        (make.sample_sde(num_steps=5, sampling_method="Heun"), 9),
        (make.sample_ode(num_steps=5, sampling_method="euler"), 4),
        (make.sample_ode(num_steps=5, sampling_method="heun2"), 8),
    ):
        loop.sample(model, x)
        assert len(calls) == expected == loop.evaluations
        assert loop.timesteps == pytest.approx(sorted(set(calls)))
        calls.clear()


def test_points_are_the_official_ones(sit_model):
    make, x = sampler(), torch.ones(2, 3)
    path = make.sample_ode(sampling_method="euler", num_steps=7)(x, sit_model)
    assert path.shape == (7, 2, 3) and torch.equal(path[0], x)
    torch.manual_seed(0)
    points = make.sample_sde(num_steps=7)(x, sit_model)
    assert len(points) == 7 and not torch.equal(points[-1], points[-2])
    torch.manual_seed(0)
    assert torch.equal(make.sample_sde(num_steps=7).sample(sit_model, x), points[-1])
    points = make.sample_sde(num_steps=7, last_step=None, diffusion_form="sigma")(x, sit_model)
    assert len(points) == 7 and torch.equal(points[-1], points[-2])


def test_model_arguments_are_handed_on():
    def model(x, t, y, scale):
        return scale * y

    loop = sampler().sample_ode(sampling_method="euler", num_steps=5)
    y = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(loop(torch.zeros(2, 1), model, y=y, scale=3)[-1], 3 * y)
    torch.testing.assert_close(loop.sample(model, torch.zeros(2, 1), {"y": y, "scale": 3}), 3 * y)


def test_half_precision_goes_on_in_fp32(sit_model):
    seen = set()

    def model(x, t):
        seen.update((x.dtype, t.dtype))
        return sit_model(x, t).bfloat16()

    points = sampler().sample_ode(sampling_method="heun2", num_steps=4)(torch.ones(2, 3).bfloat16(), model)
    assert seen == {torch.float32} and points.dtype == torch.float32


def test_a_loop_serves_every_dtype(sit_model):
    loop, x = sampler().sample_ode(sampling_method="euler", num_steps=5), torch.ones(2, 3)
    single, double = loop.sample(sit_model, x), loop.sample(sit_model, x.double())
    fresh = sampler().sample_ode(sampling_method="euler", num_steps=5).sample(sit_model, x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64) and torch.equal(double, fresh)


def per_sample_noise(indices):
    """As `ditfast.sample.SampleNoise`: a function of the sample alone."""
    generators = [torch.Generator().manual_seed(i) for i in indices]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])


@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_a_sample_does_not_depend_on_its_batch(sit_model, method):
    loop = sampler().sample_sde(sampling_method=method, num_steps=9)

    def draw(indices):
        noise = per_sample_noise(indices)
        return loop.sample(sit_model, noise(torch.empty(len(indices), 4, 2, 2)), noise_fn=noise)

    torch.testing.assert_close(torch.cat([draw(range(0, 2)), draw(range(2, 5))]), draw(range(5)))


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_times_are_shifted_and_the_ends_stay(kind):
    options = {"sampling_method": "euler"} if kind == "ode" else {"last_step_size": 0.04}
    make = getattr(sampler(), f"sample_{kind}")
    t = make(num_steps=11, timestep_shift=0.3, **options).timesteps
    end = 1 if kind == "ode" else 0.96
    u = torch.arange(11) / 10
    torch.testing.assert_close(torch.tensor(t), (end * 0.3 * u / (1 - 0.7 * u))[: len(t)])
    assert len(t) == (10 if kind == "ode" else 11)


def test_shifted_times_sample_the_data(gaussian):
    make = sampler()
    data, start = gaussian(make.transport), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for reverse in (False, True):
        loop = make.sample_ode(sampling_method="heun2", num_steps=100, timestep_shift=0.3, reverse=reverse)
        expected = data.flow(start, *((1, 0) if reverse else (0, 1)))
        assert float((loop.sample(data, start) - expected).abs().max()) < 2e-3 * float(expected.abs().max())


class Network:
    """A conditional velocity; it records its times and batch sizes."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((float(t[0]), len(x)))
        return torch.sin(x + t.view(-1, 1, 1, 1)) * (1 + y.view(-1, 1, 1, 1) / 10)


@pytest.mark.parametrize("make", [ClassifierFreeGuidance, TwoNetworkGuidance])
@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize("method", ["euler", "heun2", "Euler", "Heun"])
def test_guidance_inside_the_step_is_guidance_before_it(make, channels, method):
    if make is TwoNetworkGuidance:
        guided = TwoNetworkGuidance(Network(), Network(), 1.5, null_class=9)
    else:
        guided = ClassifierFreeGuidance(Network(), 2.5, null_class=9, channels=channels)
    x, y = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.tensor([1, 2])
    if method in ("euler", "heun2"):
        loop = sampler("GVP").sample_ode(sampling_method=method, num_steps=5)
    else:
        loop = sampler("GVP").sample_sde(sampling_method=method, num_steps=5)
    noise = [per_sample_noise(range(2)) for _ in range(2)]
    ours = loop.sample(guided, x, {"y": y}, noise[0])
    torch.testing.assert_close(ours, loop.sample(lambda x, t, y: guided(x, t, y), x, {"y": y}, noise[1]))
    assert not torch.equal(ours, loop.sample(Network(), x, {"y": y}, per_sample_noise(range(2))))


@pytest.mark.skipif(not kernels._triton.INTERPRETED, reason="the kernels run in the interpreter")
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_steps_over_the_triton_kernel(method, monkeypatch):
    loop = sampler("GVP", "noise").sample_sde(sampling_method=method, diffusion_form="sigma", num_steps=5)
    x, y = torch.randn(2, 4, 3, 3), torch.tensor([1, 2])

    def sample(backend):
        def step(x, cond, uncond, *args, **kwargs):
            assert uncond is not None  # mixed here, not before
            return kernels.guided_step(x, cond, uncond, *args, **kwargs, backend=backend)

        monkeypatch.setattr(loops, "guided_step", step)
        guided = ClassifierFreeGuidance(Network(), 3.0, null_class=9)
        return loop.sample(guided, x, {"y": y}, per_sample_noise(range(2)))

    torch.testing.assert_close(sample("triton"), sample("reference"))


def test_guidance_interval_is_in_the_time_of_the_transport():
    network = Network()
    guided = ClassifierFreeGuidance(network, 2.5, null_class=9, interval=(0.125, math.inf))
    loop = sampler().sample_ode(sampling_method="heun2", num_steps=9)
    loop.sample(guided, torch.randn(2, 4, 3, 3), {"y": torch.tensor([1, 2])})
    assert {(t, n) for t, n in network.calls} == {(t, 4 if t >= 0.125 else 2) for t in loop.timesteps}


class Switching:
    """A model that is asked for a callable at each time."""

    def __init__(self):
        self.asked = []

    def at_timestep(self, t):
        self.asked.append(t)
        return lambda x, t: torch.zeros_like(x)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_the_model_is_told_times_on_the_host_that_are_known_before(method):
    model, loop = Switching(), sampler().sample_sde(sampling_method=method, num_steps=6)
    loop.sample(model, torch.zeros(1, 2))
    assert list(dict.fromkeys(model.asked)) == loop.timesteps and all(type(t) is float for t in model.asked)
    assert len(model.asked) == loop.evaluations


def test_samples_need_no_gradient():
    model = torch.nn.Linear(3, 3)
    points = (
        sampler().sample_ode(sampling_method="euler", num_steps=3).progressive(lambda x, t: model(x), torch.ones(1, 3))
    )
    assert not next(points).requires_grad and torch.is_grad_enabled()


def test_no_samples():
    assert sampler().sample_sde(num_steps=4).sample(lambda x, t: x, torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("sample_ode", {"sampling_method": "Euler"}, "unknown sampling_method 'Euler'; did you mean 'euler'"),
        ("sample_ode", {"sampling_method": "dopri"}, "unknown sampling_method 'dopri'; did you mean 'dopri"),
        (
            "sample_ode_likelihood",
            {"sampling_method": "huen2"},
            "unknown sampling_method 'huen2'; did you mean 'heun2'",
        ),
        ("sample_sde", {"sampling_method": "heun"}, "unknown sampling_method 'heun'; did you mean 'Heun'"),
        ("sample_sde", {"diffusion_form": "sdbm"}, "unknown diffusion_form 'sdbm'.* known: constant, SBDM"),
        (
            "sample_sde",
            {"diffusion_form": "increasing"},
            "did you mean 'increasing-decreasing'|did you mean 'decreasing'",
        ),
        ("sample_sde", {"diffusion_norm": -1.0}, "diffusion_norm must be a finite number >= 0, got -1"),
        ("sample_sde", {"last_step": "mean"}, "unknown last_step 'mean'; did you mean 'Mean'"),
        ("sample_sde", {"last_step_size": 1.0}, r"last_step_size must be in \[0, 1\), got 1"),
        ("sample_ode", {"num_steps": 1}, "at least 2, got 1"),
        ("sample_sde", {"timestep_shift": 0}, "timestep_shift must be a finite number > 0, got 0"),
    ],
)
def test_bad_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(sampler(), method)(**arguments)


@pytest.mark.parametrize(
    ("transport", "method", "arguments", "message"),
    [
        (
            ("Linear", "noise", None, 0, 0),
            "sample_ode",
            {"sampling_method": "euler"},
            r"t = \[0.0\]: take sample_eps > 0",
        ),
        (("Linear",), "sample_sde", {"sampling_method": "Heun", "last_step": None}, r"t = \[1.0\]: .*or a last_step"),
        (("Linear",), "sample_sde", {"last_step": "Mean", "last_step_size": 0}, r"t = \[1.0\].*or a last_step"),
    ],
)
def test_what_is_infinite_is_refused_before_it_runs(transport, method, arguments, message):
    with pytest.raises(ValueError, match=f"the drift is infinite or undefined at {message}"):
        getattr(sampler(*transport), method)(**arguments)


def test_an_interval_of_no_times_is_refused():
    with pytest.raises(ValueError, match=r"from t = 0.4 to t = 0.30+4?: lower sample_eps or last_step_size"):
        sampler(prediction="noise", sample_eps=0.4).sample_sde(last_step_size=0.7)


def test_a_learned_sigma_is_refused():
    loop = sampler().sample_ode(sampling_method="euler", num_steps=3)
    with pytest.raises(ValueError, match=r"returned shape \(3, 4\) for x of shape \(3, 2\)"):
        loop.sample(lambda x, t: torch.cat([x, x], 1), torch.ones(3, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU has nothing to wait for")
@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_sampling_does_not_wait_for_the_device(kind):
    make = sampler()
    loop = make.sample_ode(sampling_method="heun2", num_steps=5) if kind == "ode" else make.sample_sde(num_steps=5)
    guided = ClassifierFreeGuidance(lambda x, t, y: 0.1 * x, 2.0, null_class=3, interval=(0.1, math.inf))
    noise, kwargs = torch.randn(2, 3, device="cuda"), {"y": torch.zeros(2, dtype=torch.int64, device="cuda")}
    loop.sample(guided, noise, kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.sample(guided, noise, kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
