"""Training losses and the variational bound."""

import itertools
import math

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
from ditfast.diffusion.loss import prior_bpd
from ditfast.kernels import _triton
from ditfast.kernels._op import Op
from ditfast.kernels.bound import discretized_gaussian_log_likelihood

T = torch.tensor([0, 1, 25, 49])


def make(mean=ModelMeanType.EPSILON, var=ModelVarType.LEARNED_RANGE, loss=LossType.MSE):
    betas = get_named_beta_schedule("linear", 50)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    return x_start, torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)


def conv(process):
    torch.manual_seed(0)
    return torch.nn.Conv2d(2, 4 if process.model_var_type.is_learned else 2, 1).double()


@pytest.fixture
def golden_losses(golden, dit):
    arguments = golden["in/x"], golden["in/t"], {"y": golden["in/y"]}
    return create_diffusion("").training_losses(dit, *arguments, noise=golden["in/noise"])


@pytest.mark.parametrize("term", ["loss", "mse", "vb"])
def test_losses_golden(golden, golden_losses, term):
    torch.testing.assert_close(golden_losses[term], golden[f"loss/{term}"], rtol=5e-6, atol=0)


def test_gradients_golden(golden, dit, golden_losses):
    golden_losses["loss"].mean().backward()
    checked = 0
    for name, parameter in dit.named_parameters():
        if f"grad/{name}" in golden:
            expected = golden[f"grad/{name}"]
            assert float((parameter.grad - expected).abs().max()) <= 3e-5 * float(expected.abs().max()), name
            checked += 1
    assert checked == sum(name.startswith("grad/") for name in golden)


def test_bpd_golden(golden, dit):
    process = create_diffusion("10")
    kwargs = {"y": golden["in/y"]}
    out = process.calc_bpd_loop(dit, golden["in/x"], model_kwargs=kwargs, noise_fn=lambda x: golden["in/noise"])
    assert set(out) == {name.removeprefix("bpd10/") for name in golden if name.startswith("bpd10/")}
    for name, value in out.items():
        # The golden prior was computed from fp32 table entries.
        torch.testing.assert_close(value, golden[f"bpd10/{name}"], rtol=5e-5 if name == "prior_bpd" else 1e-5, atol=0)


@pytest.mark.parametrize(("mean", "var", "loss"), list(itertools.product(ModelMeanType, ModelVarType, LossType)))
def test_every_type_trains(batch, mean, var, loss):
    process, (x_start, noise) = make(mean, var, loss), batch
    model = conv(process)
    terms = process.training_losses(lambda x, t: model(x), x_start, T, noise=noise)
    with_vb = not loss.is_vb() and var.is_learned
    assert set(terms) == {"loss"} | ({"mse"} if not loss.is_vb() else set()) | ({"vb"} if with_vb else set())
    assert all(value.shape == (4,) for value in terms.values())
    terms["loss"].sum().backward()
    gradient = model.weight.grad.flatten(1)
    assert bool(gradient.isfinite().all()) and bool((gradient.abs().sum(1) > 0).all())


@pytest.mark.parametrize("mean", ModelMeanType)
def test_mse_of_a_perfect_network_is_zero(batch, mean):
    process, (x_start, noise) = make(mean, ModelVarType.FIXED_SMALL), batch
    x_t = process.q_sample(x_start, T, noise)
    answers = [noise, x_start, process.q_posterior_mean_variance(x_start, x_t, T)[0]]
    kinds = [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X]
    terms = process.training_losses(lambda x, t: answers[kinds.index(mean)], x_start, T, noise=noise)
    assert terms["mse"].tolist() == [0, 0, 0, 0]


def test_bound_trains_only_the_variance_in_the_hybrid_loss(batch):
    (x_start, noise), gradients = batch, []
    for var in (ModelVarType.LEARNED_RANGE, ModelVarType.FIXED_SMALL):
        process = make(var=var)
        output = torch.zeros(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        both = torch.cat([output, torch.ones_like(output)], 1) if var.is_learned else output
        process.training_losses(lambda x, t, both=both: both, x_start, T, noise=noise)["loss"].sum().backward()
        gradients.append(output.grad)
    torch.testing.assert_close(*gradients)


def test_rescaled_losses(batch):
    x_start, noise = batch
    terms = {}
    for loss in LossType:
        model = conv(make(loss=loss))
        terms[loss] = make(loss=loss).training_losses(lambda x, t, m=model: m(x), x_start, T, noise=noise)
    torch.testing.assert_close(terms[LossType.RESCALED_KL]["loss"], 50 * terms[LossType.KL]["loss"])
    torch.testing.assert_close(terms[LossType.RESCALED_MSE]["vb"], terms[LossType.MSE]["vb"] * 50 / 1000)
    torch.testing.assert_close(terms[LossType.KL]["loss"], terms[LossType.MSE]["vb"])


@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("var", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE])
def test_the_hybrid_bound_is_that_of_the_moments(batch, mean, var):
    process, (x_start, noise) = make(mean, var), batch
    x_t = process.q_sample(x_start, T, noise)
    prediction, v = 0.5 * torch.stack([noise, x_start.cos()])

    def network(v):
        return lambda x, t: torch.cat([prediction, v], dim=1)

    ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
    vb = process.training_losses(network(ours), x_start, T, noise=noise)["vb"]
    expected = process.vb_terms_bpd(network(theirs), x_start, x_t, T, clip_denoised=False)["output"]
    torch.testing.assert_close(vb, expected, rtol=1e-9, atol=0)
    vb.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available() and not _triton.INTERPRETED, reason="needs Triton")
def test_the_kernels_train_as_float64_does(monkeypatch):
    """At the first, second, middle and last timesteps of the official process, where the tables differ by 1e5."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    process, t = create_diffusion(""), torch.tensor([0, 1, 500, 999], device=device)
    generator = torch.Generator().manual_seed(0)
    x_start, noise, error, v = torch.randn(4, 4, 4, 8, 8, generator=generator, dtype=torch.float64).to(device)
    output = torch.cat([noise + 0.3 * error, 0.3 * v], dim=1)

    def run(dtype):
        leaf = output.detach().to(dtype).requires_grad_()
        terms = process.training_losses(lambda x, t: leaf, x_start.to(dtype), t, noise=noise.to(dtype))
        (3 * terms["mse"] + terms["vb"]).sum().backward()
        return [value.detach().double() for value in (terms["mse"], terms["vb"], leaf.grad)]

    exact = run(torch.float64)
    taken = []
    monkeypatch.setattr(Op, "choose", lambda op, *rest: taken.append(op.name) or "triton")
    results = run(torch.float32)
    assert taken == ["q_sample", "diffusion_loss"]
    torch.testing.assert_close(results, exact, rtol=2e-5, atol=1e-7)


def test_gradients_reach_the_data(batch):
    process, (x_start, noise) = make(), batch
    x_start = x_start.requires_grad_()
    model = conv(process)
    process.training_losses(lambda x, t: model(x), x_start, T, noise=noise)["loss"].sum().backward()
    assert bool((x_start.grad.flatten(1).abs().sum(1) > 0).all())


def test_bound_of_the_posterior_itself_is_zero(batch):
    process, (x_start, noise) = make(), batch
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    t = T.clamp(min=1)
    out = process._vb_terms_bpd(lambda x, t: perfect, x_start, process.q_sample(x_start, t, noise), t)
    torch.testing.assert_close(out["output"], torch.zeros(4).double(), rtol=0, atol=1e-9)


def test_first_step_is_the_likelihood_of_the_bins(batch):
    process, (x_start, noise) = make(), batch
    t = torch.zeros(4, dtype=torch.int64)
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    out = process.vb_terms_bpd(lambda x, t: perfect, x_start, process.q_sample(x_start, t, noise), t)
    scale = 0.5 * process.posterior_log_variance_clipped[0]
    nats = discretized_gaussian_log_likelihood(x_start, means=x_start, log_scales=scale.expand_as(x_start))
    torch.testing.assert_close(out["output"], -nats.mean(dim=(1, 2, 3)) / math.log(2))


def test_prior_is_nothing_when_the_chain_forgets_the_data():
    assert float(prior_bpd(create_diffusion(""), torch.ones(1, 1))) < 1e-4
    assert float(prior_bpd(make(), torch.ones(1, 1))) > 0


def test_noise_is_drawn_when_none_is_given(batch):
    process, (x_start, _) = make(var=ModelVarType.FIXED_SMALL), batch
    torch.manual_seed(3)
    drawn = process.training_losses(lambda x, t: x, x_start, T)
    torch.manual_seed(3)
    given = process.training_losses(lambda x, t: x, x_start, T, noise=torch.randn_like(x_start))
    assert torch.equal(drawn["loss"], given["loss"])


def test_losses_of_half_precision_data_are_fp32(batch):
    process, (x_start, _) = make(), batch
    terms = process.training_losses(lambda x, t: torch.cat([x, x], 1).bfloat16(), x_start.bfloat16(), T)
    assert {value.dtype for value in terms.values()} == {torch.float32}


def test_a_process_used_in_inference_mode_can_train(batch):
    process, (x_start, noise) = make(), batch
    model = conv(process)
    with torch.inference_mode():
        process.p_sample_loop(lambda x, t: model(x), (1, 2, 3, 3), noise[:1])
    process.training_losses(lambda x, t: model(x), x_start, T, noise=noise)["loss"].sum().backward()
    assert bool((model.weight.grad.abs() > 0).all())
