"""The samplers' steps as one op: equal to steps by moments, for any prediction and variance; what the op gets."""

import pytest
import torch

from ditfast import kernels
from ditfast.diffusion import (
    ClassifierFreeGuidance,
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    TwoNetworkGuidance,
    create_diffusion,
    samplers,
)

NULL = 7
BETAS = torch.linspace(0.01, 0.4, 6)
Y = torch.tensor([1, 2, 3])


def process(mean_type=ModelMeanType.EPSILON, var_type=ModelVarType.LEARNED_RANGE, betas=BETAS):
    return GaussianDiffusion(betas=betas, model_mean_type=mean_type, model_var_type=var_type, loss_type=LossType.MSE)


def network(channels):
    """Every channel and label tells itself apart."""

    def model(x, t, y):
        wave = torch.sin(torch.arange(1.0, channels + 1, dtype=x.dtype).view(1, -1, 1) * (1 + y.view(-1, 1, 1)))
        return torch.sin(wave * x.repeat(1, channels // x.shape[1], 1) + 0.1 * t.view(-1, 1, 1))

    return model


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def given(monkeypatch):
    """The arguments of the op, call by call."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(args)
        return kernels.guided_step(*args, **kwargs)

    monkeypatch.setattr(samplers, "guided_step", recorded)
    return calls


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("p_sample", {"noise_fn": torch.cos}),
        ("ddim_sample", {"noise_fn": torch.cos}),
        ("ddim_sample", {"noise_fn": torch.cos, "eta": 0.5}),
        ("ddim_reverse_sample", {}),
    ],
)
def test_equals_the_step_by_moments(mean_type, var_type, clip, step, options, x):
    """An identity as denoised_fn leads there: p_mean_variance and the predictions of the process's own methods."""
    chain = process(mean_type, var_type)
    guided = ClassifierFreeGuidance(network(8 if var_type.is_learned else 4), 3.0, NULL)
    options |= {"model_kwargs": {"y": Y}, "clip_denoised": clip}
    t = torch.tensor([0, 2, 5 if step != "ddim_reverse_sample" else 4])
    fused = getattr(chain, step)(guided, x, t, **options)
    by_moments = getattr(chain, step)(guided, x, t, denoised_fn=lambda x: x, **options)
    for name, expected in by_moments.items():
        torch.testing.assert_close(fused[name], expected, rtol=1e-12, atol=1e-12)


def test_ddim_is_equation_12_of_its_paper(x):
    chain, t, eta = process(), torch.tensor([1, 3, 5]), 0.7
    eps = network(8)(x, t, Y)[:, :4]
    bar, before = (table[t].view(3, 1, 1) for table in (chain.alphas_cumprod, chain.alphas_cumprod_prev))
    sigma = eta * ((1 - before) / (1 - bar)).sqrt() * (1 - bar / before).sqrt()
    x_start = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    expected = before.sqrt() * x_start + (1 - before - sigma**2).sqrt() * eps + sigma * x.cos()
    options = {"noise_fn": torch.cos, "model_kwargs": {"y": Y}, "clip_denoised": False}
    out = chain.ddim_sample(network(8), x, t, eta=eta, **options)
    torch.testing.assert_close(out, {"sample": expected, "pred_xstart": x_start})


def test_variance_that_rounds_to_above_what_there_is_leaves_no_direction():
    betas = [1e-15, 0.96]  # the posterior variance of the second step is 1 - alpha_bar of the first, but for rounding
    chain = process(var_type=ModelVarType.FIXED_SMALL, betas=betas)
    assert chain.posterior_variance[1] > 1 - chain.alphas_cumprod[0]
    x = torch.ones(2, 4, 1, dtype=torch.float64)
    assert chain.ddim_sample(lambda x, t: x, x, torch.tensor([0, 1]), eta=1.0)["sample"].isfinite().all()


def test_a_process_keeps_the_steps_of_different_options_apart(x):
    chain, t, options = process(), torch.tensor([1, 3, 5]), {"noise_fn": torch.cos, "model_kwargs": {"y": Y}}
    for eta in (0.2, 0.7):
        alone = process().ddim_sample(network(8), x, t, eta=eta, **options)
        assert torch.equal(chain.ddim_sample(network(8), x, t, eta=eta, **options)["sample"], alone["sample"])


@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize(("step", "options"), [("p_sample", {}), ("ddim_sample", {"eta": 1.0})])
def test_noise_moves_all_samples_but_those_at_t_0(var_type, step, options, x):
    model, options = network(8 if var_type.is_learned else 4), options | {"model_kwargs": {"y": Y}}

    def run(noise_fn):
        return getattr(process(var_type=var_type), step)(
            model, x, torch.tensor([0, 1, 5]), noise_fn=noise_fn, **options
        )

    moved = (run(torch.ones_like)["sample"] != run(torch.zeros_like)["sample"]).flatten(1)
    assert not moved[0].any() and moved[1:].all()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize(
    ("guide", "channels"),
    [
        (ClassifierFreeGuidance(network(8), 3.0, NULL), 3),
        (ClassifierFreeGuidance(network(8), 3.0, NULL, channels=None), 4),
        (TwoNetworkGuidance(network(8), network(4), 1.0, NULL), 4),
        (ClassifierFreeGuidance(network(8), 3.0, NULL, interval=(200, 700)), 3),
    ],
)
def test_both_predictions_go_unmixed_into_one_op_a_step(loop, guide, channels, given, x):
    chain = create_diffusion("ddim5")
    getattr(chain, loop)(guide, x.shape, x, model_kwargs={"y": Y})
    assert len(given) == 5
    for t, (_, cond, uncond, *_) in zip(reversed(chain.timestep_map), given, strict=True):
        inside = guide.interval is None or 200 <= t < 700
        assert (uncond.shape if inside else uncond) == ((3, channels, 5) if inside else None)
        assert cond.shape == (3, 8 if loop == "p_sample_loop" else 4, 5)


@pytest.mark.parametrize(("eta", "given_noise"), [(0.0, False), (0.5, True)])
def test_noise_is_drawn_without_being_read_where_none_is_added(eta, given_noise, given, x):
    drawn = []
    process().ddim_sample(
        network(8), x, torch.tensor([0, 1, 5]), eta=eta, model_kwargs={"y": Y}, noise_fn=lambda x: drawn.append(x) or x
    )
    assert len(drawn) == 1 and (given[0][3] is not None) is given_noise


def test_guidance_over_a_batch_partly_inside_the_interval_is_that_of_its_samples(x):
    guide = ClassifierFreeGuidance(network(8), 3.0, NULL, interval=(2, 4))
    t, options = torch.tensor([1, 2, 5]), {"noise_fn": torch.cos}
    out = process().p_sample(guide, x, t, model_kwargs={"y": Y}, **options)["sample"]
    for i, scale in enumerate((1.0, 3.0, 1.0)):
        alone = ClassifierFreeGuidance(network(8), scale, NULL)
        one = process().p_sample(alone, x[i : i + 1], t[i : i + 1], model_kwargs={"y": Y[i : i + 1]}, **options)
        torch.testing.assert_close(out[i], one["sample"][0])


@pytest.mark.skipif(not kernels._triton.INTERPRETED, reason="the kernels run in the interpreter")
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_chain_over_the_triton_kernel(loop, monkeypatch, x):
    def sample(backend):
        monkeypatch.setattr(samplers, "guided_step", lambda *args: kernels.guided_step(*args, backend=backend))
        guide = ClassifierFreeGuidance(network(8), 3.0, NULL)
        options = {"noise_fn": torch.cos, "model_kwargs": {"y": Y}}
        return getattr(create_diffusion("ddim5"), loop)(guide, x.shape, x.float(), **options)

    torch.testing.assert_close(sample("triton"), sample("reference"))


def test_a_step_can_be_differentiated(x):
    x.requires_grad_()
    options = {"model_kwargs": {"y": Y}, "clip_denoised": False}
    out = process().p_sample(network(8), x, torch.tensor([0, 1, 5]), **options)
    (grad,) = torch.autograd.grad(out["sample"].sum(), x)
    assert grad.isfinite().all() and grad.abs().min() > 0


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
def test_unknown_option_is_an_error(step, x):
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        getattr(process(), step)(network(8), x, torch.tensor([0, 1, 5]), clip=True)


def test_timesteps_of_another_number_than_samples_are_an_error(x):
    with pytest.raises(ValueError, match="t has 2 timesteps for 3 samples"):
        process().p_sample(lambda x, t: x.repeat(1, 2, 1), x, torch.tensor([0, 1]))
