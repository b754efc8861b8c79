"""Training losses and the variational bound, as free functions over a process and a network.

`GaussianDiffusion` carries them as methods. Equation numbers "DDPM" are those of Ho et al. 2020, "IDDPM" those of
Nichol and Dhariwal 2021.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ditfast.kernels import diffusion_loss
from ditfast.kernels.bound import discretized_gaussian_log_likelihood, mean_flat, normal_kl

from .types import LossType, Model, ModelMeanType, ModelVarType, Moments, TensorFn

if TYPE_CHECKING:
    from .gaussian import GaussianDiffusion


class BoundTerms(TypedDict):
    """One step's term of the bound (B,) in bits per dimension, and the x_0 (B, C, ...) that gave it."""

    output: Tensor
    pred_xstart: Tensor


def _bound_from_moments(
    process: "GaussianDiffusion", moments: Moments, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    true_mean, _, true_log_variance = process.q_posterior_mean_variance(x_start, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, moments["mean"], moments["log_variance"])
    likelihood = discretized_gaussian_log_likelihood(
        x_start, means=moments["mean"], log_scales=0.5 * moments["log_variance"]
    )
    return torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl)) / math.log(2)


def vb_terms_bpd(
    process: "GaussianDiffusion",
    model: Model,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> BoundTerms:
    """The terms L_t (at t = 0: L_0) of the variational bound in bits per dimension (DDPM equation 5).

    Args:
        x_start: x_0 (B, C, ...); t: (B,) integers; x_t: a draw of q(x_t | x_0).

    Returns:
        `output` (B,) and `pred_xstart`, shaped like x_start.
    """
    moments = process.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
    return {"output": _bound_from_moments(process, moments, x_start, x_t, t), "pred_xstart": moments["pred_xstart"]}


def _loss_table(process: "GaussianDiffusion") -> Tensor:
    """(T, 2) float64 coefficients a, b of the MSE's target; (T, 7) with the bound's columns for a learned variance.

    Of those, `gap` is the factor from the error of a prediction to that of the posterior mean that it gives.
    """
    one, zero = torch.ones_like(process.betas), torch.zeros_like(process.betas)
    target, gap = (one, zero), one
    if process.model_mean_type is ModelMeanType.EPSILON:
        target, gap = (zero, one), -process.posterior_mean_coef1 * process.sqrt_recipm1_alphas_cumprod
    elif process.model_mean_type is ModelMeanType.START_X:
        gap = process.posterior_mean_coef1
    if not process.model_var_type.is_learned:
        return torch.stack(target, dim=1)
    small = process.posterior_log_variance_clipped
    middle, half = zero, one
    if process.model_var_type is ModelVarType.LEARNED_RANGE:
        middle, half = (process.log_betas + small) / 2, (process.log_betas - small) / 2
    first = torch.arange(process.num_timesteps) == 0
    return torch.stack([*target, gap, small, middle, half, first.to(one)], dim=1)


def training_losses(
    process: "GaussianDiffusion",
    model: Model,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None = None,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of one step for each sample, before any average over the batch.

    With an MSE loss: the MSE of the prediction (DDPM equation 14), plus, where the variance is learned, the bound's
    term with the mean detached, so that it trains the variance only (L_hybrid, IDDPM equation 16). With a KL loss: the
    bound's term in bits per dimension.

    Args:
        model: any `model(x_t (B, C, ...), original t (B,), **model_kwargs)`.
        x_start: x_0 (B, C, ...), any float dtype; half precision is noised in fp32.
        t: (B,) integers in 0 .. T - 1.
        noise: shaped like x_start; drawn from torch's global generator if None.

    Returns:
        `loss` (B,), with an MSE loss also `mse` (B,), with a learned variance also `vb` (B,).
    """
    if noise is None:
        noise = torch.randn_like(x_start)
    x_t = process.q_sample(x_start, t, noise)
    if process.loss_type.is_vb():
        bound = vb_terms_bpd(process, model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
        return {"loss": bound * process.num_timesteps if process.loss_type is LossType.RESCALED_KL else bound}

    unmixed, _ = process.call_unmixed(model, x_t, t, model_kwargs)
    table = process.gather_rows("loss", t, x_t, lambda: _loss_table(process))
    if process.model_mean_type is ModelMeanType.PREVIOUS_X:
        # Such a network predicts the posterior mean, which in the first step is x_0 itself.
        x_start, _, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    # Without the weight the bound's term outweighs the MSE; it is stated for chains of 1000 steps.
    weight = process.num_timesteps / 1000 if process.loss_type is LossType.RESCALED_MSE else 1.0
    columns = table[:, 2:] if process.model_var_type.is_learned else None
    mse, vb = diffusion_loss(unmixed.mixed(), x_start, noise, table[:, 0], table[:, 1], columns, weight=weight)
    return {"loss": mse, "mse": mse} if vb is None else {"loss": mse + vb, "mse": mse, "vb": vb}


def prior_bpd(process: "GaussianDiffusion", x_start: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension: (B, ...) -> (B,); L_T of DDPM equation 5."""
    t = torch.full((len(x_start),), process.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, t)
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)


@torch.no_grad()
def calc_bpd_loop(
    process: "GaussianDiffusion",
    model: Model,
    x_start: Tensor,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    noise_fn: TensorFn = torch.randn_like,
) -> dict[str, Tensor]:
    """The whole variational bound in bits per dimension, one draw of x_t for each of the T steps.

    Args:
        noise_fn: given x_start, draws noise of its shape; called once a step, from t = T - 1 down.

    Returns:
        `total_bpd` and `prior_bpd` (B,); `vb`, `xstart_mse` and `mse` (B, T), whose columns run from t = T - 1 to 0.
    """
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for step in reversed(range(process.num_timesteps)):
        t = torch.full((len(x_start),), step, device=x_start.device)
        noise = noise_fn(x_start)
        x_t = process.q_sample(x_start, t, noise)
        terms = vb_terms_bpd(process, model, x_start, x_t, t, clip_denoised, model_kwargs)
        eps = process.predict_eps_from_xstart(x_t, t, terms["pred_xstart"])
        columns["vb"].append(terms["output"])
        columns["xstart_mse"].append(mean_flat((terms["pred_xstart"] - x_start) ** 2))
        columns["mse"].append(mean_flat((eps - noise) ** 2))
    bounds = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    prior = prior_bpd(process, x_start)
    return {"total_bpd": bounds["vb"].sum(dim=1) + prior, "prior_bpd": prior, **bounds}
