"""The process: tables, q, the posterior, and the moments a network gives."""

import itertools

import pytest
import torch

from ditfast.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    create_diffusion,
    get_named_beta_schedule,
)
from ditfast.diffusion.gaussian import MOST_CACHED


def make(mean=ModelMeanType.EPSILON, var=ModelVarType.FIXED_SMALL, loss=LossType.MSE, steps=50):
    betas = get_named_beta_schedule("linear", steps)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss)


def oracle(process, x_start, noise, t, var_values=0.0):
    """A network that knows x_0."""
    x_t = process.q_sample(x_start, t, noise)
    answer = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x_start,
        ModelMeanType.PREVIOUS_X: process.q_posterior_mean_variance(x_start, x_t, t)[0],
    }[process.model_mean_type]
    if process.model_var_type.is_learned:
        answer = torch.cat([answer, torch.full_like(answer, var_values)], dim=1)
    return x_t, lambda x, t: answer


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x_start, noise, torch.tensor([0, 1, 25, 49])


def test_posterior_golden():
    process = create_diffusion("")
    assert float(process.posterior_variance[1]) == pytest.approx(5.4531876613021935e-05, rel=1e-12)
    assert float(process.posterior_log_variance_clipped[0]) == pytest.approx(-9.81672513529567, rel=1e-12)
    assert process.posterior_variance[0] == 0


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("table", ["alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"])
def test_tables_golden(golden, schedule, table):
    ours = getattr(create_diffusion("", schedule), table)
    torch.testing.assert_close(ours, golden[f"table/{schedule}/{table}"], rtol=1e-11, atol=0)


@pytest.mark.parametrize(("given", "taken"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_table_entries_are_cast_after_float64(given, taken):
    process = create_diffusion("")
    x = torch.zeros(2, 1, dtype=getattr(torch, given))
    entries = process.gather("log_one_minus_alphas_cumprod", torch.tensor([0, 999]), x)
    assert entries.dtype == getattr(torch, taken) and entries.shape == (2, 1)
    assert torch.equal(entries[:, 0], process.log_one_minus_alphas_cumprod[[0, 999]].to(entries.dtype))


def test_q_sample_has_the_moments_of_q(batch):
    process, (x_start, noise, t) = make(), batch
    mean, variance, log_variance = process.q_mean_variance(x_start, t)
    torch.testing.assert_close(process.q_sample(x_start, t, noise), mean + variance.sqrt() * noise)
    torch.testing.assert_close(log_variance, variance.log())


def test_posterior_is_bayes_rule(batch):
    process, (x_start, noise, t) = make(), batch
    t = t.clamp(min=1)
    x_t = process.q_sample(x_start, t, noise)
    mean, variance, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    prior_mean, prior_variance, _ = process.q_mean_variance(x_start, t - 1)
    beta = process.betas[t].view(-1, 1, 1, 1)
    precision = 1 / prior_variance + (1 - beta) / beta
    torch.testing.assert_close(variance, 1 / precision)
    torch.testing.assert_close(mean, (prior_mean / prior_variance + (1 - beta).sqrt() * x_t / beta) / precision)


@pytest.mark.parametrize(("mean", "var"), list(itertools.product(ModelMeanType, ModelVarType)))
def test_a_perfect_network_recovers_x0_and_the_posterior_mean(batch, mean, var):
    process, (x_start, noise, t) = make(mean, var), batch
    x_t, model = oracle(process, x_start, noise, t)
    out = process.p_mean_variance(model, x_t, t, clip_denoised=False)
    torch.testing.assert_close(out["pred_xstart"], x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out["mean"], process.q_posterior_mean_variance(x_start, x_t, t)[0], rtol=1e-9, atol=1e-9)
    assert out["variance"].shape == out["log_variance"].shape == x_t.shape


@pytest.mark.parametrize(
    ("var", "value", "expected"),
    [
        (ModelVarType.FIXED_SMALL, 0.0, lambda p: p.posterior_log_variance_clipped),
        (ModelVarType.FIXED_LARGE, 0.0, lambda p: torch.cat([p.posterior_variance[1:2], p.betas[1:]]).log()),
        (ModelVarType.LEARNED, -3.0, lambda p: torch.full((50,), -3.0).double()),
        (ModelVarType.LEARNED_RANGE, -1.0, lambda p: p.posterior_log_variance_clipped),
        (ModelVarType.LEARNED_RANGE, 1.0, lambda p: p.betas.log()),
        (ModelVarType.LEARNED_RANGE, 0.5, lambda p: 0.75 * p.betas.log() + 0.25 * p.posterior_log_variance_clipped),
    ],
)
def test_variance_types(batch, var, value, expected):
    process, (x_start, noise, t) = make(var=var), batch
    x_t, model = oracle(process, x_start, noise, t, value)
    out = process.p_mean_variance(model, x_t, t)
    torch.testing.assert_close(out["log_variance"][:, 0, 0, 0], expected(process)[t])
    if var is not ModelVarType.FIXED_SMALL:
        torch.testing.assert_close(out["variance"], out["log_variance"].exp())


def test_denoised_fn_then_clip(batch):
    process, (x_start, noise, t) = make(), batch
    x_t, model = oracle(process, x_start, noise, t)
    out = process.p_mean_variance(model, x_t, t, denoised_fn=lambda x: 3 * x)
    torch.testing.assert_close(out["pred_xstart"], (3 * x_start).clamp(-1, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out["mean"], process.q_posterior_mean_variance(out["pred_xstart"], x_t, t)[0])


def test_extra_output_is_handed_on(batch):
    x_start, noise, t = batch
    out = make().p_mean_variance(lambda x, t: (noise, "features"), x_start, t)
    assert out["extra"] == "features"


def test_half_precision_outputs_are_widened(batch):
    x_start, _, t = batch
    out = make().p_mean_variance(lambda x, t: x.bfloat16(), x_start.bfloat16(), t)
    assert out["mean"].dtype == torch.float32


def test_condition_mean_shifts_by_variance_times_gradient(batch):
    process, (x_start, noise, t) = make(), batch
    x_t, model = oracle(process, x_start, noise, t)
    out = process.p_mean_variance(model, x_t, t)
    shifted = process.condition_mean(lambda x, t, k: k * x, out, x_t, t, model_kwargs={"k": 2.0})
    torch.testing.assert_close(shifted, out["mean"] + out["variance"] * 2 * x_t)


def test_condition_score_shifts_the_noise(batch):
    process, (x_start, noise, t) = make(), batch
    x_t, model = oracle(process, x_start, noise, t)
    out = process.condition_score(lambda x, t: torch.ones_like(x), process.p_mean_variance(model, x_t, t), x_t, t)
    eps = noise - (1 - process.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(out["pred_xstart"], process.predict_xstart_from_eps(x_t, t, eps))
    torch.testing.assert_close(out["mean"], process.q_posterior_mean_variance(out["pred_xstart"], x_t, t)[0])


def test_cond_fn_is_given_original_timesteps():
    process, x = create_diffusion("ddim50"), torch.zeros(1, 4, 1, 1)
    seen = []
    out = process.p_mean_variance(lambda x, t: torch.zeros(1, 8, 1, 1), x, torch.tensor([3]))
    process.condition_mean(lambda x, t: seen.append(t.tolist()) or x, out, x, torch.tensor([3]))
    assert seen == [[60]]


@pytest.mark.parametrize("steps", [1, 2])
def test_shortest_chains_have_finite_variances(steps):
    process = create_diffusion(str(steps))
    assert bool(process.posterior_log_variance_clipped.isfinite().all())


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 50]), "0 .. 49, got values from 0 to 50"),
        (torch.tensor([-1, 3]), "0 .. 49, got values from -1 to 3"),
        (torch.tensor([0.0, 1.0]), "int64.*float32"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\)"),
        (torch.tensor([0, 1, 2]), "3 timesteps for 2 samples"),
    ],
)
def test_bad_timesteps(t, message):
    with pytest.raises(ValueError, match=message):
        make().q_sample(torch.zeros(2, 1), t)


@pytest.mark.parametrize(
    ("learn_sigma", "channels", "message"),
    [
        (
            True,
            4,
            r"expected 2\*C=8 channels, got 4: create_diffusion\(learn_sigma=False\) or a model with learn_sigma",
        ),
        (False, 8, r"expected C=4 channels, got 8: create_diffusion\(learn_sigma=True\) or a model with learn_sigma"),
        (True, 5, r"returned shape \(2, 5, 3, 3\).*expected \(2, 8, 3, 3\)"),
    ],
)
def test_wrong_output_channels(learn_sigma, channels, message):
    process = create_diffusion("10", learn_sigma=learn_sigma)
    with pytest.raises(ValueError, match=message):
        process.p_mean_variance(
            lambda x, t: torch.zeros(2, channels, 3, 3), torch.zeros(2, 4, 3, 3), torch.tensor([0, 9])
        )


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.1, 0.0], [0.1, 1.5], [float("nan")]])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="betas must"):
        GaussianDiffusion(
            betas=betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )


@pytest.mark.parametrize("call", ["q_sample", "q_posterior_mean_variance"])
def test_mismatched_shapes(call):
    x, other, t = torch.zeros(2, 1, 2), torch.zeros(2, 1, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must be equal"):
        make().q_sample(x, t, other) if call == "q_sample" else make().q_posterior_mean_variance(x, other, t)


def test_q_sample_of_integers_is_that_of_their_values():
    process = create_diffusion("10")
    x, noise, t = torch.arange(6).view(2, 3), torch.randn(2, 3), torch.tensor([0, 9])
    assert torch.equal(process.q_sample(x, t, noise), process.q_sample(x.float(), t, noise))


def test_q_sample_of_samples_without_elements():
    empty = torch.zeros(1, 4, 0, 8)
    assert create_diffusion("10").q_sample(empty, torch.zeros(1, dtype=torch.int64)).shape == empty.shape


def test_tables_of_many_etas_are_dropped_again():
    process = create_diffusion("10", learn_sigma=False)
    x, t = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)
    for i in range(MOST_CACHED + 10):
        process.ddim_sample(lambda x, t: 0 * x, x, t, eta=i / 100)
    assert len(process._cache) == MOST_CACHED
