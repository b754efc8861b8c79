"""The Gaussian diffusion process: its tables, q(x_t | x_0), the posterior, and the moments of p(x_{t-1} | x_t).

Equation numbers "DDPM" are those of Ho et al. 2020, "IDDPM" those of Nichol and Dhariwal 2021.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ditfast.kernels import q_sample

from . import loss, samplers
from .guidance import unmixed_form
from .types import ConditionFn, LossType, Model, ModelMeanType, ModelVarType, Moments, TensorFn, Unmixed

# Tables of a process on its devices. Its own are far fewer, but each eta of DDIM makes one more.
MOST_CACHED = 64


def _checked_betas(betas: Tensor | Sequence[float]) -> Tensor:
    table = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    if table.ndim != 1 or table.numel() == 0:
        raise ValueError(f"betas must be a non-empty vector, got shape {tuple(table.shape)}")
    if not bool(((table > 0) & (table <= 1)).all()):
        raise ValueError(f"betas must lie in (0, 1], got values from {table.min():g} to {table.max():g}")
    return table


class GaussianDiffusion:
    """A diffusion over t = 0 .. T - 1 with the interface of the official code.

    The tables (`betas`, `alphas_cumprod`, `posterior_variance`, ...) are (T,) float64 tensors on the CPU. Entries are
    taken by `gather`, in fp32, or in float64 where the data is. Neither sampling nor training waits for the device.

    Args:
        betas: (T,) variances of q(x_t | x_{t-1}), each in (0, 1].
        model_mean_type: what the network predicts.
        model_var_type: where the variance of p comes from.
        loss_type: what `training_losses` minimizes.
        timestep_map: for each t, the timestep that models and cond_fn are given; t itself when None.

    Raises:
        ValueError: betas of another shape or range. Every method also raises it for a t that is not (B,) integers in
            0 .. T - 1 on the data's device (out of range on a GPU: a device assertion), and for a network whose
            number of output channels does not fit `model_var_type`.
    """

    def __init__(
        self,
        *,
        betas: Tensor | Sequence[float],
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        timestep_map: Sequence[int] | None = None,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.betas = _checked_betas(betas)
        self.num_timesteps = len(self.betas)
        self.timestep_map = list(range(self.num_timesteps) if timestep_map is None else timestep_map)
        self._original_timesteps = torch.tensor(self.timestep_map)

        one = self.betas.new_ones(1)
        alphas = 1 - self.betas
        bar = torch.cumprod(alphas, dim=0)
        bar_before = torch.cat([one, bar[:-1]])
        self.alphas_cumprod = bar
        self.alphas_cumprod_prev = bar_before
        self.alphas_cumprod_next = torch.cat([bar[1:], 0 * one])
        self.sqrt_alphas_cumprod = bar.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - bar).sqrt()
        self.one_minus_alphas_cumprod = 1 - bar
        self.log_one_minus_alphas_cumprod = (1 - bar).log()
        self.sqrt_recip_alphas_cumprod = (1 / bar).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / bar - 1).sqrt()

        self.posterior_mean_coef1 = self.betas * bar_before.sqrt() / (1 - bar)
        self.posterior_mean_coef2 = (1 - bar_before) * alphas.sqrt() / (1 - bar)
        self.posterior_variance = self.betas * (1 - bar_before) / (1 - bar)
        # The posterior variance of the first step is 0; its logarithm is replaced by that of the second.
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_betas = self.betas.log()
        self.fixed_large_variance = torch.cat([first, self.betas[1:]])
        self.fixed_large_log_variance = self.fixed_large_variance.log()
        self._cache: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _select(
        self,
        name: str,
        t: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        make: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if t.ndim != 1 or t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"t must be (B,) int64 timesteps, got shape {tuple(t.shape)} of {t.dtype}")
        if t.device != device:
            raise ValueError(f"t is on {t.device} and the data on {device}: move one of them")
        key = (name, device, dtype)
        if key not in self._cache:
            if len(self._cache) >= MOST_CACHED:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = (make() if make else getattr(self, name)).to(device=device, dtype=dtype)
        try:
            return self._cache[key].index_select(0, t)
        except IndexError:
            raise ValueError(
                f"t must lie in 0 .. {self.num_timesteps - 1}, got values from {t.min()} to {t.max()}"
            ) from None

    def gather_rows(self, name: str, t: Tensor, like: Tensor, make: Callable[[], Tensor] | None = None) -> Tensor:
        """Rows at t (B,) of the table `name` (T, ...), that `make` makes at first, in fp32 or the float64 of `like`."""
        if len(t) != len(like):
            raise ValueError(f"t has {len(t)} timesteps for {len(like)} samples")
        return self._select(name, t, like.device, torch.promote_types(like.dtype, torch.float32), make)

    def gather(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries at t (B,) of the table `name` as (B, 1, ...), to multiply `like` (B, ...), in fp32 or its float64."""
        return self.gather_rows(name, t, like).view(-1, *(1,) * (like.ndim - 1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps (B,) that models are given for the process's own t (B,)."""
        return self._select("_original_timesteps", t, t.device, torch.int64)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each shaped like x_start (B, ...) (DDPM equation 4)."""
        mean = self.gather("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self.gather("one_minus_alphas_cumprod", t, x_start).expand_as(mean)
        return mean, variance, self.gather("log_one_minus_alphas_cumprod", t, x_start).expand_as(mean)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM equation 4); noise is drawn if None."""
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, x_start {tuple(x_start.shape)}: they must be equal"
            )
        alpha = self.gather_rows("sqrt_alphas_cumprod", t, x_start)
        sigma = self.gather_rows("sqrt_one_minus_alphas_cumprod", t, x_start)
        x_start, noise = (v if v.is_floating_point() else v.to(alpha.dtype) for v in (x_start, noise))
        return q_sample(x_start, noise, alpha, sigma)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, clipped log variance of q(x_{t-1} | x_t, x_0), each shaped like x_t (DDPM equations 6, 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start has shape {tuple(x_start.shape)}, x_t {tuple(x_t.shape)}: they must be equal")
        mean = self.gather("posterior_mean_coef1", t, x_t) * x_start + self.gather("posterior_mean_coef2", t, x_t) * x_t
        variance = self.gather("posterior_variance", t, x_t).expand_as(mean)
        return mean, variance, self.gather("posterior_log_variance_clipped", t, x_t).expand_as(mean)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 from which noise eps leads to x_t (DDPM equation 4 solved for x_0)."""
        scaled = self.gather("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self.gather("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that leads from pred_xstart to x_t (DDPM equation 4 solved for the noise)."""
        scaled = self.gather("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - pred_xstart) / self.gather("sqrt_recipm1_alphas_cumprod", t, x_t)

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """The x_0 whose posterior mean at x_t is xprev (DDPM equation 7 solved for x_0)."""
        rest = xprev - self.gather("posterior_mean_coef2", t, x_t) * x_t
        return rest / self.gather("posterior_mean_coef1", t, x_t)

    def call_unmixed(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Unmixed, Any]:
        """Run a network, or those of a guidance without mixing: what they returned, and the extra output."""
        output, extra = unmixed_form(model)(x, self.original_timesteps(t), **(model_kwargs or {})), None
        if isinstance(output, tuple):
            output, extra = output
        unmixed = output if isinstance(output, Unmixed) else Unmixed(output)
        channels = x.shape[1]
        expected = 2 * channels if self.model_var_type.is_learned else channels
        if unmixed.cond.shape != (len(x), expected, *x.shape[2:]):
            self._refuse_output(tuple(unmixed.cond.shape), tuple(x.shape))
        return unmixed, extra

    def call_model(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Run a network: its prediction (B, C, ...), its variance channels (B, C, ...) or None, and its extra output.

        Half-precision outputs are widened to fp32, so that the moments are never rounded to half precision.
        """
        unmixed, extra = self.call_unmixed(model, x, t, model_kwargs)
        output = unmixed.mixed()
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if not self.model_var_type.is_learned:
            return output, None, extra
        prediction, var_values = output.chunk(2, dim=1)
        return prediction, var_values, extra

    def _refuse_output(self, given: tuple[int, ...], x_shape: tuple[int, ...]) -> NoReturn:
        channels = x_shape[1]
        if given == (x_shape[0], channels, *x_shape[2:]):
            raise ValueError(
                f"the process learns its variance: expected 2*C={2 * channels} channels, got {channels}: "
                "create_diffusion(learn_sigma=False) or a model with learn_sigma=True"
            )
        if given == (x_shape[0], 2 * channels, *x_shape[2:]) and not self.model_var_type.is_learned:
            raise ValueError(
                f"the process has a fixed variance: expected C={channels} channels, got {2 * channels}: "
                "create_diffusion(learn_sigma=True) or a model with learn_sigma=False"
            )
        expected = (x_shape[0], channels * (1 + self.model_var_type.is_learned), *x_shape[2:])
        raise ValueError(f"the model returned shape {given} for x of shape {x_shape}: expected {expected}")

    def moments(
        self,
        prediction: Tensor,
        var_values: Tensor | None,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: TensorFn | None = None,
        extra: Any = None,
    ) -> Moments:
        """Moments of p(x_{t-1} | x_t) from what `call_model` returned; see `p_mean_variance`."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            x_start = self.predict_xstart_from_eps(x, t, prediction)
        elif self.model_mean_type is ModelMeanType.START_X:
            x_start = prediction
        else:
            x_start = self.predict_xstart_from_xprev(x, t, prediction)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = prediction
        if self.model_mean_type is not ModelMeanType.PREVIOUS_X:
            mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        variance, log_variance = self._model_variance(var_values, x, t)
        return {
            "mean": mean,
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": x_start,
            "extra": extra,
        }

    def _model_variance(self, var_values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        small_log = self.gather("posterior_log_variance_clipped", t, x)
        if var_values is not None:
            log_variance = var_values
            if self.model_var_type is ModelVarType.LEARNED_RANGE:
                fraction = (var_values + 1) / 2
                log_variance = fraction * self.gather("log_betas", t, x) + (1 - fraction) * small_log
            return log_variance.exp(), log_variance
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return self.gather("posterior_variance", t, x), small_log
        return self.gather("fixed_large_variance", t, x), self.gather("fixed_large_log_variance", t, x)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: TensorFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Moments:
        """Moments of p(x_{t-1} | x_t), and the network's x_0, each shaped like x (DDPM equation 11, IDDPM equation 15).

        Args:
            model: any `model(x (B, C, ...), original t (B,), **model_kwargs)`.
            x: x_t (B, C, ...).
            t: (B,) integers, the process's own timesteps.
            clip_denoised: clamp the predicted x_0 to [-1, 1].
            denoised_fn: applied to the predicted x_0 before the clamp.
        """
        prediction, var_values, extra = self.call_model(model, x, t, model_kwargs)
        return self.moments(prediction, var_values, x, t, clip_denoised, denoised_fn, extra)

    def _condition_gradient(
        self, cond_fn: ConditionFn, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Tensor:
        return cond_fn(x, self.original_timesteps(t), **(model_kwargs or {}))

    def condition_mean(
        self,
        cond_fn: ConditionFn,
        p_mean_var: Moments,
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean shifted by variance * cond_fn (Dhariwal and Nichol 2021, algorithm 1), shaped like x."""
        return p_mean_var["mean"] + p_mean_var["variance"] * self._condition_gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self,
        cond_fn: ConditionFn,
        p_mean_var: Moments,
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Moments:
        """The moments after eps -= sqrt(1 - alpha_bar) * cond_fn (Dhariwal and Nichol 2021, algorithm 2)."""
        eps = self.predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = self._condition_gradient(cond_fn, x, t, model_kwargs)
        eps = eps - self.gather("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        x_start = self.predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {**p_mean_var, "mean": mean, "pred_xstart": x_start}

    p_sample = samplers.p_sample
    p_sample_loop = samplers.p_sample_loop
    p_sample_loop_progressive = samplers.p_sample_loop_progressive
    ddim_sample = samplers.ddim_sample
    ddim_reverse_sample = samplers.ddim_reverse_sample
    ddim_sample_loop = samplers.ddim_sample_loop
    ddim_sample_loop_progressive = samplers.ddim_sample_loop_progressive
    training_losses = loss.training_losses
    calc_bpd_loop = loss.calc_bpd_loop
    vb_terms_bpd = loss.vb_terms_bpd
    _vb_terms_bpd = loss.vb_terms_bpd
