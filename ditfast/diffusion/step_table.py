"""Every sampler's step as coefficients of `ditfast.kernels.guided_step`, a row for each timestep."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .types import ModelMeanType, ModelVarType

if TYPE_CHECKING:
    from .gaussian import GaussianDiffusion

Sampler = Literal["ddpm", "ddim", "ddim_reverse"]


def step_table(process: "GaussianDiffusion", sampler: Sampler, eta: float, mean_type: ModelMeanType) -> Tensor:
    """(T, 6), or (T, 7) for "ddpm" with a learned variance, float64 on the CPU; the columns are those of the op.

    eta in [0, 1] is that of "ddim" (Song et al. 2020, equation 16); mean_type is what the prediction is.
    """
    zero, one = torch.zeros_like(process.betas), torch.ones_like(process.betas)
    x0_x, x0_pred = {
        ModelMeanType.EPSILON: (process.sqrt_recip_alphas_cumprod, -process.sqrt_recipm1_alphas_cumprod),
        ModelMeanType.START_X: (zero, one),
        ModelMeanType.PREVIOUS_X: (
            -process.posterior_mean_coef2 / process.posterior_mean_coef1,
            1 / process.posterior_mean_coef1,
        ),
    }[mean_type]
    if sampler != "ddpm":
        return torch.stack([x0_x, x0_pred, *_ddim(process, sampler, eta)], dim=1)
    mean = (process.posterior_mean_coef2, process.posterior_mean_coef1, zero)
    if mean_type is ModelMeanType.PREVIOUS_X:
        mean = (zero, zero, one)
    std, *std_v = _ddpm_std(process)
    not_last = torch.arange(process.num_timesteps) > 0
    return torch.stack([x0_x, x0_pred, *mean, std * not_last, *std_v], dim=1)


def _ddpm_std(process: "GaussianDiffusion") -> tuple[Tensor, ...]:
    """(std,), or for a learned variance (std, std_v): the standard deviation is std * exp(std_v * v)."""
    small, large = process.posterior_log_variance_clipped, process.log_betas
    match process.model_var_type:
        case ModelVarType.LEARNED_RANGE:
            return ((large + small) / 4).exp(), (large - small) / 4
        case ModelVarType.LEARNED:
            return torch.ones_like(small), torch.full_like(small, 0.5)
        case ModelVarType.FIXED_SMALL:
            return ((small / 2).exp(),)
        case ModelVarType.FIXED_LARGE:
            return ((process.fixed_large_log_variance / 2).exp(),)


def _ddim(process: "GaussianDiffusion", sampler: Sampler, eta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """next_x, next_x0, next_pred, std: sqrt(bar') x_0 + sqrt(1 - bar' - std^2) eps with the eps between x and x_0."""
    bar = process.alphas_cumprod_prev if sampler == "ddim" else process.alphas_cumprod_next
    variance = eta**2 * process.posterior_variance
    # At eta = 1 the two are equal where alpha_bar_t is small, and their difference could round to below 0.
    by_x0 = (1 - bar - variance).clamp(min=0).sqrt() / process.sqrt_recipm1_alphas_cumprod
    return by_x0 * process.sqrt_recip_alphas_cumprod, bar.sqrt() - by_x0, torch.zeros_like(bar), variance.sqrt()
