"""DDPM and DDIM chains, forwards and backwards."""

from functools import partial

import pytest
import torch

from ditfast.diffusion import ClassifierFreeGuidance, TwoNetworkGuidance, create_diffusion


@pytest.mark.parametrize(
    ("name", "respacing", "loop", "options"),
    [
        ("ddpm_5", "5", "p_sample_loop", {}),
        ("ddim_eta0_5", "ddim5", "ddim_sample_loop", {}),
        ("ddim_eta1_5", "ddim5", "ddim_sample_loop", {"eta": 1.0}),
    ],
)
def test_samples_golden(golden, dit, replay, name, respacing, loop, options):
    process = create_diffusion(respacing)
    assert process.timestep_map == golden[f"sample/{name}_timesteps"].tolist()
    start, kwargs = golden["in/x"], {"y": golden["in/y"]}
    sample = getattr(process, loop)(
        dit, start.shape, start, clip_denoised=False, model_kwargs=kwargs, noise_fn=replay, **options
    )
    expected = golden[f"sample/{name}"]
    assert float((sample - expected).abs().max()) <= 3e-6 * float(expected.abs().max())


def chain_moments(process, step, **options):
    """Exact mean and standard deviation of a chain's samples, for a network that is affine in x.

    Each step is then affine in x and its noise, so three points tell it, and moments are carried without any sampling.
    """
    probes, noise = torch.tensor([[0.0], [1.0], [0.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
    mean, variance = 0.0, 1.0
    for i in reversed(range(process.num_timesteps)):
        options["noise_fn"] = lambda x: noise
        base, by_x, by_noise = step(x=probes, t=torch.full((3,), i), clip_denoised=False, **options)["sample"].tolist()
        slope, spread = by_x[0] - base[0], by_noise[0] - base[0]
        mean, variance = base[0] + slope * mean, slope**2 * variance + spread**2
    return mean, variance**0.5


@pytest.mark.parametrize(("step", "options"), [("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 1.0})])
def test_samples_of_the_best_network_have_the_moments_of_the_data(gaussian_data, optimal_eps, step, options):
    errors = []
    for respacing in ("ddim500", ""):
        process = create_diffusion(respacing, learn_sigma=False, sigma_small=True)
        mean, std = chain_moments(process, partial(getattr(process, step), optimal_eps(process)), **options)
        assert mean == pytest.approx(gaussian_data[0], rel=0.02)
        errors.append(std / gaussian_data[1] - 1)
    assert abs(errors[1]) < 0.015 and abs(errors[1]) < 0.6 * abs(errors[0])  # of first order in the step


def test_reverse_ddim_then_ddim_returns(optimal_eps):
    process = create_diffusion("", learn_sigma=False)
    model = optimal_eps(process)
    start = torch.linspace(-0.5, 1.3, 16, dtype=torch.float64)[:, None]
    x = start
    for i in range(999):
        x = process.ddim_reverse_sample(model, x, torch.full((16,), i), clip_denoised=False)["sample"]
    assert float(x.mean().abs()) < 0.5 and float(x.std()) > 1
    for i in range(999, 0, -1):
        x = process.ddim_sample(model, x, torch.full((16,), i), clip_denoised=False)["sample"]
    assert float((x - start).abs().max()) < 1e-2


def test_reverse_ddim_of_a_single_point_is_exact():
    process = create_diffusion("ddim50", learn_sigma=False)
    x_start, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.tensor([0, 7, 20, 48])
    out = process.ddim_reverse_sample(lambda x, t: noise, process.q_sample(x_start, t, noise), t, clip_denoised=False)
    torch.testing.assert_close(out["sample"], process.q_sample(x_start, t + 1, noise))
    torch.testing.assert_close(out["pred_xstart"], x_start)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_progressive_form_yields_every_step(loop):
    process = create_diffusion("ddim20", learn_sigma=False)
    noise = torch.randn(2, 1, 2, 2)
    torch.manual_seed(1)
    steps = list(getattr(process, loop + "_progressive")(lambda x, t: 0.1 * x, noise.shape, noise))
    torch.manual_seed(1)
    assert torch.equal(steps[-1]["sample"], getattr(process, loop)(lambda x, t: 0.1 * x, noise.shape, noise))
    assert len(steps) == 20 and steps[0].keys() == {"sample", "pred_xstart"}
    torch.testing.assert_close(steps[-1]["sample"], steps[-1]["pred_xstart"])


def test_noise_is_drawn_in_the_official_order():
    process = create_diffusion("5", learn_sigma=False, sigma_small=True)
    torch.manual_seed(0)
    drawn = process.p_sample_loop(lambda x, t: 0.1 * x, (3, 2))
    following = torch.randn(1)
    torch.manual_seed(0)
    start, *steps = [torch.randn(3, 2) for _ in range(6)]
    replay = iter(steps)
    assert torch.equal(
        drawn, process.p_sample_loop(lambda x, t: 0.1 * x, (3, 2), start, noise_fn=lambda x: next(replay))
    )
    assert torch.equal(following, torch.randn(1))


def test_cond_fn_moves_the_ancestral_step_by_variance_times_gradient():
    process = create_diffusion("ddim20", learn_sigma=False)
    x, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 3, 10, 19])

    def step(cond_fn):
        return process.p_sample(lambda x, t: 0.1 * x, x, t, cond_fn=cond_fn, noise_fn=torch.zeros_like)["sample"]

    variance = process.p_mean_variance(lambda x, t: 0.1 * x, x, t)["variance"]
    torch.testing.assert_close(step(lambda x, t: torch.cos(x)) - step(None), variance * torch.cos(x))


def test_cond_fn_with_the_exact_gradient_samples_the_conditional(gaussian_data, optimal_eps):
    """With data N(m, s^2) and a measurement y = x_0 + N(0, r^2), the guided chain must sample Bayes' posterior."""
    (mean, std), r, y = gaussian_data, 0.3, 1.0
    process = create_diffusion("ddim500", learn_sigma=False)
    bars = dict(zip(process.timestep_map, process.alphas_cumprod.tolist(), strict=True))

    def gradient(x, t):
        bar = bars[int(t[0])]
        gain = bar**0.5 * std**2 / (bar * std**2 + 1 - bar)
        variance = std**2 - gain * bar**0.5 * std**2
        return gain * (y - mean - gain * (x - bar**0.5 * mean)) / (variance + r**2)

    model = optimal_eps(process)
    sampled = chain_moments(process, partial(process.ddim_sample, model), cond_fn=gradient)
    gain = std**2 / (std**2 + r**2)
    assert sampled == pytest.approx((mean + gain * (y - mean), (1 - gain) ** 0.5 * std), rel=0.02)


def test_ddim_with_eta_1_stays_finite_in_fp32():
    """Long chains cut to few steps: the variance of the last step comes within rounding of 1 - alpha_bar."""
    process = create_diffusion("ddim10", diffusion_steps=4000, learn_sigma=False)
    assert bool(process.ddim_sample_loop(lambda x, t: 0.1 * x, (8, 3), eta=1.0).isfinite().all())


def test_samples_need_no_gradient():
    model = torch.nn.Linear(3, 3)
    process = create_diffusion("5", learn_sigma=False)
    steps = process.p_sample_loop_progressive(lambda x, t: model(x), (2, 3))
    assert not next(steps)["sample"].requires_grad and torch.is_grad_enabled()


class Switching:
    """A model that is asked for a callable a step."""

    def __init__(self):
        self.asked = []

    def at_timestep(self, t):
        self.asked.append(t)
        return lambda x, t: torch.zeros_like(x)


def test_loops_tell_the_model_its_timestep_on_the_host():
    model = Switching()
    create_diffusion("ddim5", learn_sigma=False).p_sample_loop(model, (1, 2))
    assert model.asked == [800, 600, 400, 200, 0]


class Shrink(torch.nn.Module):
    """A network with a parameter, on a device of its own."""

    def __init__(self, device):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((1,), 0.1, device=device))

    def forward(self, x, t, y=None):
        return self.factor * x


@pytest.mark.parametrize(
    "wrap",
    [
        lambda network: network,
        lambda network: network.forward,
        lambda network: ClassifierFreeGuidance(network, 2.0, 5),
        lambda network: TwoNetworkGuidance(network.forward, network, 1.0, 5),
        lambda network: TwoNetworkGuidance(ClassifierFreeGuidance(network, 2.0, 5), network, 1.0, 5).__call__,
    ],
)
def test_noise_is_drawn_on_the_models_device(wrap):
    process = create_diffusion("5", learn_sigma=False)
    kwargs = {"y": torch.zeros(2, dtype=torch.int64, device="meta")}
    steps = process.p_sample_loop_progressive(wrap(Shrink("meta")), (2, 3), model_kwargs=kwargs)
    assert next(steps)["sample"].device.type == "meta"


def test_a_module_without_parameters_samples_on_the_default_device():
    class Halve(torch.nn.Module):
        def forward(self, x, t):
            return x / 2

    assert create_diffusion("5", learn_sigma=False).p_sample_loop(Halve(), (2, 3)).isfinite().all()


def test_progress_shows_a_bar(capsys):
    create_diffusion("5", learn_sigma=False).p_sample_loop(lambda x, t: x, (1, 2), progress=True)
    assert "sampling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, m: p.p_sample_loop(m, (2, 3), torch.zeros(3, 3)), r"noise has shape \(3, 3\), but \(2, 3\)"),
        (lambda p, m: p.ddim_sample_loop(m, (2, 3), eta=1.5), "eta must lie between 0"),
        (lambda p, m: p.ddim_sample_loop(m, (2, 3), eta=float("nan")), "eta must lie between 0"),
        (lambda p, m: p.ddim_reverse_sample(m, torch.zeros(1, 3), torch.tensor([0]), eta=0.5), "eta must be 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(create_diffusion("5", learn_sigma=False), lambda x, t: x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU has nothing to wait for")
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_chain_does_not_wait_for_the_device(loop):
    process = create_diffusion("5", learn_sigma=False)
    noise = torch.randn(2, 3, device="cuda")
    sample = getattr(process, loop)
    sample(lambda x, t: 0.1 * x, noise.shape, noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(lambda x, t: 0.1 * x, noise.shape, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_clamp_may_be_given_by_position_as_officially():
    process = create_diffusion("5", learn_sigma=False)
    x, t = 9 * torch.ones(2, 3), torch.full((2,), 4)

    def model(x, t):
        return 0.1 * x

    for step in (process.p_sample, process.ddim_sample, process.ddim_reverse_sample):
        clamped, free = (step(model, x, t, clip)["pred_xstart"] for clip in (True, False))
        assert clamped.abs().max() <= 1 < free.abs().max()
    for loop in (process.p_sample_loop, process.ddim_sample_loop):
        torch.manual_seed(0)
        given = loop(model, (2, 3), x, False)
        torch.manual_seed(0)
        assert torch.equal(given, loop(model, (2, 3), x, clip_denoised=False))
