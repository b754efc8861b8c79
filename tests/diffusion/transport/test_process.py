"""Losses, velocity and score, how times are drawn, and what is refused."""

import math

import pytest
import torch
from torch import nn

from ditfast.diffusion import Sampler, create_transport
from ditfast.kernels import _triton
from ditfast.kernels._op import Op

from .conftest import NAMES


def chosen(kind: str) -> list[str]:
    return [name for name in NAMES if name.startswith(kind + "/")]


def close(value, golden) -> bool:
    return float((value - golden).abs().max()) <= 1e-12 * float(golden.abs().max())


@pytest.mark.parametrize("name", chosen("loss"))
def test_losses_golden(sit_golden, sit_model, name):
    _, path, prediction, weight = name.split("/")
    transport = create_transport(path, prediction, None if weight == "none" else weight)
    t0, t1 = transport.interval(transport.train_eps)
    t = sit_golden["in/u"] * (t1 - t0) + t0
    terms = transport.training_losses(sit_model, sit_golden["in/x1"], t=t, noise=sit_golden["in/x0"])
    assert close(terms["loss"], sit_golden[name])
    assert terms.keys() == {"loss", "pred"} and terms["pred"].shape == sit_golden["in/x1"].shape


@pytest.mark.parametrize("name", [*chosen("drift"), *chosen("score")])
def test_drift_and_score_golden(sit_golden, sit_model, name):
    kind, path, prediction = name.split("/")
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)  # not in the file's metadata, but in its values
    value = getattr(create_transport(path, prediction), f"get_{kind}")()(sit_golden["in/init"], t, sit_model)
    assert close(value, sit_golden[name])


@pytest.mark.parametrize(
    ("path", "prediction", "train", "sample"),
    [
        ("Linear", "velocity", (0, 1), (0, 1)),
        ("GVP", "velocity", (0, 1), (0, 1)),
        ("Linear", "noise", (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("GVP", "score", (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("VP", "velocity", (0, 1 - 1e-5), (0, 1 - 1e-3)),
        ("VP", "noise", (0, 1 - 1e-5), (0, 1 - 1e-3)),
    ],
)
def test_intervals(path, prediction, train, sample):
    transport = create_transport(path, prediction)
    assert transport.interval(transport.train_eps) == train
    assert transport.interval(transport.sample_eps) == sample
    given = create_transport(path, prediction, train_eps=0.1)
    assert (given.train_eps, given.sample_eps) == (0.1, transport.sample_eps)


SDE, LAST = {"sde": True}, {"last_step_size": 0.04}


@pytest.mark.parametrize(
    ("path", "prediction", "options", "expected"),
    [
        ("Linear", "velocity", {}, (0, 1)),
        ("Linear", "velocity", {"eval": True} | LAST, (0, 1)),
        ("Linear", "velocity", {"reverse": True}, (1, 0)),
        ("Linear", "velocity", SDE, (0.01, 0.99)),
        ("GVP", "velocity", SDE | LAST | {"eval": True}, (0.001, 0.96)),
        ("GVP", "velocity", SDE | {"diffusion_form": "sigma"}, (0, 0.99)),
        ("Linear", "velocity", SDE | LAST | {"reverse": True}, (0.99, 0.04)),
        ("GVP", "noise", {}, (0.01, 0.99)),
        ("Linear", "score", {"eval": True}, (0.001, 0.999)),
        ("GVP", "noise", SDE | LAST | {"eval": True, "diffusion_form": "sigma"}, (0.001, 0.96)),
        ("Linear", "noise", {"reverse": True}, (0.99, 0.01)),
        ("VP", "velocity", {}, (0, 0.99)),
        ("VP", "score", {"eval": True}, (0, 0.999)),
        ("VP", "velocity", SDE | LAST, (0, 0.96)),
        ("VP", "noise", LAST, (0, 0.99)),
        ("VP", "velocity", {"reverse": True}, (1, 0.01)),
    ],
)
def test_the_official_interval(path, prediction, options, expected):
    """Of eps 0.01 in training and 0.001 in sampling."""
    assert create_transport(path, prediction).check_interval(0.01, 0.001, **options) == pytest.approx(expected)


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
@pytest.mark.parametrize("form", ["SBDM", "sigma"])
def test_the_sampler_runs_through_the_official_interval(path, prediction, form):
    transport = create_transport(path, prediction)
    eps = transport.train_eps, transport.sample_eps
    loop = Sampler(transport).sample_sde(diffusion_form=form, num_steps=5)
    t0, t1 = transport.check_interval(*eps, diffusion_form=form, sde=True, eval=True, last_step_size=0.04)
    assert (loop.timesteps[0], loop.timesteps[-1]) == pytest.approx((t0, t1), abs=1e-15)
    loop = Sampler(transport).sample_ode(sampling_method="heun2", num_steps=5)
    assert (loop.timesteps[0], loop.timesteps[-1]) == pytest.approx(
        transport.check_interval(*eps, eval=True), abs=1e-15
    )


def test_an_unknown_form_has_no_interval():
    with pytest.raises(ValueError, match="unknown diffusion_form 'sigm'; did you mean 'sigma'"):
        create_transport().check_interval(0.0, 0.0, diffusion_form="sigm", sde=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_prior_log_density(dtype):
    z = 5 * torch.randn(3, 4, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).flatten(1).sum(1)
    found = create_transport().prior_logp(z)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-13 if dtype is torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_drift_and_score_are_those_of_the_samplers(path, prediction, sit_model):
    """A step of Euler, of the ODE and of the SDE with w = 0.7, in float64."""
    transport = create_transport(path, prediction, sample_eps=0.1)
    drift, score = transport.get_drift(), transport.get_score()
    sampler, generator = Sampler(transport), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    ode = sampler.sample_ode(sampling_method="euler", num_steps=3)
    t, dt = ode.timesteps[0], ode.timesteps[1] - ode.timesteps[0]
    at = torch.full((3,), t, dtype=torch.float64)
    torch.testing.assert_close(ode(x, sit_model)[1], x + dt * drift(x, at, sit_model), rtol=1e-12, atol=1e-12)
    sde = sampler.sample_sde(diffusion_form="constant", diffusion_norm=0.7, num_steps=3, last_step=None)
    found = next(sde.progressive(sit_model, x, noise_fn=lambda _: noise))
    expected = x + dt * (drift(x, at, sit_model) + 0.7 * score(x, at, sit_model)) + math.sqrt(1.4 * dt) * noise
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_loss_is_that_of_plain_pytorch(prediction, dtype):
    transport = create_transport("GVP", prediction, "likelihood")
    generator = torch.Generator().manual_seed(0)
    x1, noise = (torch.randn(5, 3, 7, 7, generator=generator).to(dtype) for _ in range(2))
    t = torch.rand(5, generator=generator)
    net = nn.Conv2d(3, 3, 1)

    def run(losses):
        # In the compute dtype that the process chooses: half-precision data is noised in fp32.
        net.to(torch.promote_types(dtype, torch.float32)).zero_grad()
        loss = losses(lambda x, t: net(x) * t.view(-1, 1, 1, 1))
        loss.mean().backward()
        return loss.detach(), net.weight.grad.clone()

    def plain(model):
        at = transport.at(t.to(torch.promote_types(dtype, torch.float32)))
        alpha, sigma, d_alpha, d_sigma, factor = (v.view(-1, 1, 1, 1) for v in at)
        pred = model(alpha * x1 + sigma * noise, t.to(at.alpha))
        if prediction == "velocity":
            return ((pred - d_alpha * x1 - d_sigma * noise) ** 2).flatten(1).mean(1)
        error = pred - noise if prediction == "noise" else pred * sigma + noise
        return (factor / sigma**2 * error**2).flatten(1).mean(1)

    fused = run(lambda model: transport.training_losses(model, x1, t=t, noise=noise)["loss"])
    for value, expected in zip(fused, run(plain), strict=True):
        assert value.dtype == expected.dtype
        tolerance = 1e-12 if dtype is torch.float64 else 2e-5
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=0.1 * tolerance)


@pytest.mark.skipif(not torch.cuda.is_available() and not _triton.INTERPRETED, reason="needs Triton")
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_the_kernels_train_as_float64_does(prediction, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transport, t = create_transport("VP", prediction, "velocity"), torch.tensor([0.0, 0.4, 0.95], device=device)
    generator = torch.Generator().manual_seed(0)
    x1, noise, error = torch.randn(3, 3, 4, 8, 8, generator=generator, dtype=torch.float64).to(device)

    def run(dtype):
        leaf = (noise + 0.3 * error).to(dtype).requires_grad_()
        loss = transport.training_losses(lambda x, t: leaf + 0.1 * x, x1.to(dtype), t=t, noise=noise.to(dtype))["loss"]
        loss.sum().backward()
        return [value.detach().double() for value in (loss, leaf.grad)]

    exact = run(torch.float64)
    taken = []
    monkeypatch.setattr(Op, "choose", lambda op, *rest: taken.append(op.name) or "triton")
    results = run(torch.float32)
    assert taken == ["q_sample", "diffusion_loss"]
    torch.testing.assert_close(results, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_the_best_network_of_a_single_point_has_no_loss(prediction, gaussian):
    transport = create_transport("GVP", prediction, "velocity")
    data = gaussian(transport)
    data.mean, data.std = 0.4, 0.0
    loss = transport.training_losses(data, torch.full((64, 2, 3), 0.4, dtype=torch.float64))["loss"]
    assert float(loss.abs().max()) < 1e-20


def test_cosine_loss_is_of_the_direction():
    transport = create_transport(use_cosine_loss=True)
    x1, noise = torch.randn(2, 6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    target = x1 - noise
    for factor, cos in ((1, 0), (3, 0), (-2, 2)):
        terms = transport.training_losses(lambda x, t, f=factor: f * target, x1, t=t, noise=noise)
        torch.testing.assert_close(terms["cos"], torch.full_like(t, cos))
        torch.testing.assert_close(terms["mse"], ((factor - 1) * target).square().flatten(1).mean(1))
        torch.testing.assert_close(terms["loss"], terms["mse"] + terms["cos"])
    mixed = transport.training_losses(lambda x, t: target.flip(2), x1, t=t, noise=noise)["cos"]
    position = 1 - (target * target.flip(2)).sum(1) / (target.norm(dim=1) * target.flip(2).norm(dim=1))
    torch.testing.assert_close(mixed, position.flatten(1).mean(1))


def test_randomness_is_drawn_in_the_official_order_and_can_be_passed():
    transport, x1 = create_transport("Linear", "noise"), torch.ones(5, 2, 3)
    torch.manual_seed(3)
    drawn = transport.training_losses(lambda x, t: x, x1)["loss"]
    torch.manual_seed(3)
    noise, u = torch.randn_like(x1), torch.rand(5)
    before = torch.get_rng_state()
    passed = transport.training_losses(lambda x, t: x, x1, t=u * (1 - 2e-3) + 1e-3, noise=noise)["loss"]
    torch.testing.assert_close(drawn, passed)
    assert torch.equal(before, torch.get_rng_state())


def test_model_arguments_are_handed_on():
    seen = {}
    create_transport().training_losses(lambda x, t, **kwargs: seen.update(kwargs) or x, torch.ones(1, 2), {"y": 7})
    assert seen == {"y": 7}


def quantiles(**options):
    t = create_transport(**options).sample_timesteps(100_000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.shape == (100_000,)
    return t.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()


def test_times_are_uniform_over_the_interval():
    assert quantiles(path_type="Linear", train_eps=0.1) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.005)


def test_lognormal_times_lie_in_the_middle():
    upper = 1 / (1 + math.exp(-0.6745))  # the sigmoid of a normal's upper quartile
    assert quantiles(use_lognorm=True)[1:4] == pytest.approx([1 - upper, 0.5, upper], abs=0.005)


def test_training_times_are_shifted():
    assert quantiles(timestep_shift=0.3)[1:4] == pytest.approx(
        [0.3 * u / (1 - 0.7 * u) for u in (0.25, 0.5, 0.75)], abs=0.005
    )


def test_times_come_from_the_generator():
    transport = create_transport()
    a, b = (transport.sample_timesteps(3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, transport.sample_timesteps(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "linear"}, "unknown path_type 'linear'; did you mean 'Linear'.* known: Linear, GVP, VP"),
        ({"prediction": "nosie"}, "unknown prediction 'nosie'; did you mean 'noise'"),
        ({"loss_weight": "likelyhood"}, "unknown loss_weight 'likelyhood'; did you mean 'likelihood'"),
        ({"train_eps": 0.5}, r"train_eps must be in \[0, 0.5\), got 0.5"),
        ({"sample_eps": -1e-3}, r"sample_eps must be in \[0, 0.5\), got -0.001"),
        ({"prediction": "noise", "use_cosine_loss": True}, "needs prediction 'velocity', got 'noise'"),
        ({"timestep_shift": 0.0}, "timestep_shift must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**arguments)


def test_loss_weight_none_has_a_name():
    assert create_transport(loss_weight="none") == create_transport()


@pytest.mark.parametrize("t", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)])
def test_bad_times(t):
    with pytest.raises(ValueError, match=r"t must be \(3,\) floats in \[0, 1\], got shape .* of torch"):
        create_transport().training_losses(lambda x, t: x, torch.ones(3, 2), t=t)


@pytest.mark.parametrize("name", ["get_drift", "get_score"])
def test_a_time_that_is_no_tensor(name):
    with pytest.raises(ValueError, match=r"t must be a tensor of \(3,\) floats in \[0, 1\], got 0.5"):
        getattr(create_transport(), name)()(torch.ones(3, 2), 0.5, lambda x, t: x)


@pytest.mark.parametrize(
    ("model", "given"), [(lambda x, t: torch.cat([x, x], 1), r"shape \(3, 4\)"), (lambda x, t: (x, None), "a tuple")]
)
def test_what_is_not_shaped_like_x_is_refused(model, given):
    with pytest.raises(ValueError, match=rf"returned {given} for x of shape \(3, 2\).*first half"):
        create_transport().training_losses(model, torch.ones(3, 2))


def test_times_on_another_device():
    with pytest.raises(ValueError, match="t is on meta and the data on cpu"):
        create_transport().drift(torch.ones(3, 2), torch.zeros(3, device="meta"), lambda x, t: x)
