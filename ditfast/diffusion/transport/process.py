"""The training process: x_t on a path, a network's loss at t, and the velocity and score that its output means."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditfast.kernels import diffusion_loss, q_sample
from ditfast.kernels.bound import mean_flat

from ..schedules import unknown_name
from ..types import Model
from .diffusion_forms import check_form
from .paths import PATHS, PREDICTIONS, Affine, Point, noise_of, shift_timesteps, velocity_of

LOSS_WEIGHTS = ("none", "velocity", "likelihood")


@dataclass(frozen=True)
class Transport:
    """A stochastic interpolant between noise and data, with the interface of the official SiT code.

    Time t is a float in [0, 1]: 0 is noise, 1 is data. `create_transport` makes one, and has the arguments explained.
    Two runs with the same t and noise have the same losses, so a caller that passes both has no randomness in here.
    """

    path_type: str
    prediction: str
    loss_weight: str
    train_eps: float
    sample_eps: float
    use_lognorm: bool = False
    use_cosine_loss: bool = False
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("path_type", self.path_type, PATHS),
            ("prediction", self.prediction, PREDICTIONS),
            ("loss_weight", self.loss_weight, LOSS_WEIGHTS),
        ):
            if name not in known:
                raise unknown_name(kind, name, known)
        for kind, eps in (("train_eps", self.train_eps), ("sample_eps", self.sample_eps)):
            if not 0 <= eps < 0.5:
                raise ValueError(f"{kind} must be in [0, 0.5), got {eps}")
        if self.use_cosine_loss and self.prediction != "velocity":
            raise ValueError(
                f"the cosine loss compares velocities: use_cosine_loss needs prediction 'velocity', got "
                f"{self.prediction!r}"
            )
        shift_timesteps(torch.zeros(()), self.timestep_shift)

    def at(self, t: Tensor) -> Point:
        """The path's coefficients at t, each shaped like t."""
        return PATHS[self.path_type](t)

    def interval(self, eps: float, last_step_size: float = 0.0) -> tuple[float, float]:
        """The times (t0, t1) between which nothing is infinite, with `eps` kept off; 1 - last_step_size ends an SDE."""
        t1 = 1 - (last_step_size or eps)
        return (0.0 if self.path_type == "VP" else eps), t1

    def check_interval(
        self,
        train_eps: float,
        sample_eps: float,
        *,
        diffusion_form: str = "SBDM",
        sde: bool = False,
        reverse: bool = False,
        eval: bool = False,
        last_step_size: float = 0.0,
    ) -> tuple[float, float]:
        """The times (t0, t1) that the official code trains and samples between, with its arguments.

        As `interval` of sample_eps where `eval` is set, else of train_eps, but that on Linear and GVP a velocity needs
        no eps along the ODE, and along an SDE none at t = 0 but for SBDM. (A transport made with an eps of its own
        keeps it off all the same: see `create_transport`.)

        Args:
            sde: an SDE's, which alone has a last step: it ends at 1 - last_step_size where that is not 0.
            reverse: gives (1 - t0, 1 - t1): from data to noise where the interval is symmetric. On VP that starts at
                t = 1, where its velocity is infinite; `Sampler.sample_ode` goes back through the same times instead.

        Raises:
            ValueError: an unknown diffusion_form (it says the nearest).
        """
        check_form(diffusion_form)
        eps = sample_eps if eval else train_eps
        needless = self.path_type != "VP" and self.prediction == "velocity"
        t0, t1 = self.interval(0.0 if needless and not sde else eps, last_step_size if sde else 0.0)
        if needless and diffusion_form != "SBDM":
            t0 = 0.0
        return (1 - t0, 1 - t1) if reverse else (t0, t1)

    def prior_logp(self, z: Tensor) -> Tensor:
        """The log density (B,) of the prior N(0, 1) at noise z (B, ...), in nats; of half precision in fp32."""
        z = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(1)
        return -0.5 * (z.shape[1] * math.log(2 * math.pi) + z.square().sum(1))

    def sample_timesteps(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """Training times (B,) float32 on `device`: uniform or logit-normal, shifted, then put into the interval.

        `generator` is a CPU generator; torch's global one if None.
        """
        if self.use_lognorm:
            u = torch.randn(batch_size, generator=generator).sigmoid()
        else:
            u = torch.rand(batch_size, generator=generator)
        t0, t1 = self.interval(self.train_eps)
        return (shift_timesteps(u, self.timestep_shift) * (t1 - t0) + t0).to(device)

    def training_losses(
        self,
        model: Model,
        x1: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one step for each sample, before any average over the batch.

        The mean square of prediction - target (SiT, arXiv:2401.08740, section 2); that of a noise, or of a score times
        sigma, is multiplied by the loss weight.

        Args:
            model: any `model(x_t (B, C, ...), t (B,), **model_kwargs)` -> (B, C, ...).
            x1: data (B, C, ...), any float dtype; half precision is noised in fp32.
            t: (B,) floats; drawn by `sample_timesteps`, after the noise, if None.
            noise: x_0, shaped like x1; drawn from torch's global generator if None.

        Returns:
            `loss` (B,), what is to be minimized; `pred`, the model's output; with the cosine loss its two terms, `mse`
            and `cos` (B,), the mean over positions of 1 - cos(prediction, target), taken over channels.

        Raises:
            ValueError: t is not (B,) floats; noise, or what the model returned, is not shaped like x1.
        """
        noise = torch.randn_like(x1) if noise is None else noise
        t = self.sample_timesteps(len(x1), x1.device) if t is None else t
        t = checked_times(t, x1)
        at = self.at(t)
        x_t = q_sample(x1, noise, at.alpha, at.sigma)
        pred = checked_output(model(x_t, t, **(model_kwargs or {})), x_t)
        if self.prediction == "velocity":
            mse, _ = diffusion_loss(pred, x1, noise, at.d_alpha, at.d_sigma)
            if not self.use_cosine_loss:
                return {"loss": mse, "pred": pred}
            cos = _cosine_loss(pred, _mix(at.d_alpha, x1, at.d_sigma, noise))
            return {"loss": mse + cos, "mse": mse, "cos": cos, "pred": pred}
        by_noise = -1 / at.sigma if self.prediction == "score" else torch.ones_like(t)
        mse, _ = diffusion_loss(pred, x1, noise, torch.zeros_like(t), by_noise)
        return {"loss": mse * self._weight(at), "pred": pred}

    def _weight(self, at: Point) -> Tensor:
        """(B,) factor of the mse of a noise or score, sigma^2 of the score's included."""
        weight = at.sigma**2 if self.prediction == "score" else torch.ones_like(at.sigma)
        if self.loss_weight == "velocity":
            return weight * (at.score_factor / at.sigma) ** 2
        if self.loss_weight == "likelihood":
            return weight * at.score_factor / at.sigma**2
        return weight

    def drift(self, x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
        """The velocity of the probability flow at x (B, C, ...) and t (B,), shaped like x."""
        t = checked_times(t, x)
        return _apply(velocity_of(self.prediction, self.at(t)), x, checked_output(model(x, t, **model_kwargs), x))

    def score(self, x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
        """The gradient of log p_t at x (B, C, ...) and t (B,), shaped like x; not finite at t = 1, where sigma is 0."""
        t = checked_times(t, x)
        at = self.at(t)
        by_x, by_pred = noise_of(self.prediction, at)
        form = Affine(-by_x / at.sigma, -by_pred / at.sigma)
        return _apply(form, x, checked_output(model(x, t, **model_kwargs), x))

    def get_drift(self) -> Callable[..., Tensor]:
        """`drift`, as the official code is asked for it: a function (x, t, model, **model_kwargs)."""
        return self.drift

    def get_score(self) -> Callable[..., Tensor]:
        """`score`, as `get_drift`."""
        return self.score


def checked_times(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) in the dtype that x is computed in, at least fp32; ValueError where it is not one float per sample."""
    if not isinstance(t, Tensor):
        raise ValueError(f"t must be a tensor of ({len(x)},) floats in [0, 1], got {t!r}")
    if t.shape != (len(x),) or not t.is_floating_point():
        raise ValueError(f"t must be ({len(x)},) floats in [0, 1], got shape {tuple(t.shape)} of {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"t is on {t.device} and the data on {x.device}: move one of them")
    return t.to(torch.promote_types(x.dtype, torch.float32))


def checked_output(output: Any, x: Tensor) -> Tensor:
    """What a model returned; ValueError where it is not a tensor shaped like x."""
    if not isinstance(output, Tensor) or output.shape != x.shape:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the model returned {given} for x of shape {tuple(x.shape)}: expected a tensor of that shape; a network "
            "that learns a variance must return the first half of its channels here"
        )
    return output


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    shape = (-1, *(1,) * (x.ndim - 1))
    return a.view(shape) * x + b.view(shape) * y


def _apply(form: Affine, x: Tensor, pred: Tensor) -> Tensor:
    return _mix(form.by_x, x, form.by_pred, pred)


def _cosine_loss(pred: Tensor, target: Tensor) -> Tensor:
    return mean_flat(1 - torch.nn.functional.cosine_similarity(pred.to(target.dtype), target, dim=1))


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    *,
    use_lognorm: bool = False,
    use_cosine_loss: bool = False,
    timestep_shift: float = 1.0,
) -> Transport:
    """A `Transport` with the official arguments, and those of LightningDiT (arXiv:2501.01423) by name.

    Args:
        path_type: "Linear", "GVP" or "VP".
        prediction: what the network predicts: "velocity", "noise" or "score".
        loss_weight: of a noise or score: None or "none"; "velocity", by which its loss is that of the velocity that it
            means; "likelihood". The loss of a velocity has none.
        train_eps, sample_eps: how far training and sampling stay away from t = 1 and, but for VP, from t = 0. By
            default 0 for a velocity on Linear and GVP, 1e-5 and 1e-3 on VP, else 1e-3. What is given holds, also where
            the official function takes 0 all the same, for a velocity on Linear and GVP.
        use_lognorm: draws the training times as sigmoid(N(0, 1)) instead of uniformly.
        use_cosine_loss: adds the loss of the velocity's direction.
        timestep_shift: of the training times, see `shift_timesteps`; a sampler has its own.

    Raises:
        ValueError: an unknown name (it says the nearest), an eps outside [0, 0.5), a shift that is not positive, a
            cosine loss of another prediction than a velocity.
    """
    if path_type == "VP":
        train, sample = 1e-5, 1e-3
    else:
        train = sample = 0.0 if prediction == "velocity" else 1e-3
    return Transport(
        path_type,
        prediction,
        "none" if loss_weight is None else loss_weight,
        train if train_eps is None else train_eps,
        sample if sample_eps is None else sample_eps,
        use_lognorm,
        use_cosine_loss,
        timestep_shift,
    )
