"""The probability flow by torchdiffeq's solvers: adaptive steps, and the likelihood of data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..samplers import at_timestep
from ..types import Model, TensorFn
from .paths import velocity_of
from .process import Transport
from .steps import check_finite

# Of torchdiffeq 0.2.4 and later; its euler and heun2 too, which only the likelihood takes from there.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
TORCHDIFFEQ_METHODS = (*ADAPTIVE, "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


def _odeint(method: str) -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            f"sampling_method {method!r} needs torchdiffeq: pip install 'ditfast[ode]'; sample_ode with 'euler' or "
            "'heun2' needs nothing"
        ) from error
    return odeint


class _Solver:
    """A solver over given times; ImportError where torchdiffeq is missing, ValueError for an end that is singular."""

    timesteps = None  # only the solver knows, as it goes

    def __init__(self, transport: Transport, times: Tensor, method: str, atol: float, rtol: float) -> None:
        self._odeint = _odeint(method)
        self._transport, self._times = transport, times
        ends = times[[0, -1]]
        velocity = torch.stack(velocity_of(transport.prediction, transport.at(ends)), dim=-1)
        check_finite(ends, velocity, "take sample_eps > 0")
        self._options: dict[str, Any] = {"method": method, "atol": atol, "rtol": rtol}
        # The last step may go past the end, with the point at the end interpolated, unless the end is a point to meet.
        # The noise of a VP path has no velocity beyond t = 1, and no path has anything to tell before t = 0.
        backwards = bool(times[0] > times[-1])
        if method in ADAPTIVE and (backwards or (transport.path_type, transport.prediction) == ("VP", "noise")):
            self._options["options"] = {"step_t": times[-1:]}

    def _velocity(self, model: Model, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        return self._transport.drift(x, t.to(x.device, x.dtype).expand(len(x)), at_timestep(model, float(t)), **kwargs)

    def _solve(self, field: Callable[[Tensor, Any], Any], start: Any, device: torch.device) -> Any:
        with torch.no_grad():
            return self._odeint(field, start, self._times.to(device), **self._options)


class OdeSolver(_Solver):
    """Sampling along the probability flow; called as officially, `solver(init, model, **model_kwargs)`.

    Where the steps are adaptive, they are shared by a batch, so that a sample depends on those beside it, within the
    tolerance. A half-precision init is solved in fp32.
    """

    def __call__(self, init: Tensor, model: Model, /, **model_kwargs: Any) -> Tensor:
        """(N, B, C, ...): init and the points at the later ones of N equidistant times."""
        init = init.to(torch.promote_types(init.dtype, torch.float32))
        return self._solve(lambda t, x: self._velocity(model, x, t, model_kwargs), init, init.device)

    def sample(
        self,
        model: Model,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise_fn: TensorFn = torch.randn_like,
    ) -> Tensor:
        """The end (B, C, ...) of the path that starts at noise (B, C, ...), as `FixedSteps.sample`; draws no noise."""
        return self(noise, model, **(model_kwargs or {}))[-1]


class OdeLikelihood(_Solver):
    """The log density that the probability flow gives data; called as officially, `likelihood(x, model, **kwargs)`.

    d log p / dt = -div v along the flow (Chen et al. 2018, arXiv:1806.07366). The divergence is Hutchinson's unbiased
    estimate with one vector of random signs for the whole path (Grathwohl et al. 2019, arXiv:1810.01367), so that a
    solver meets a smooth field; it is exact where the Jacobian is diagonal.
    """

    def __call__(self, x: Tensor, model: Model, /, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `log_density`."""
        return self.log_density(model, x, model_kwargs)

    def log_density(
        self,
        model: Model,
        x: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise_fn: TensorFn = torch.randn_like,
    ) -> tuple[Tensor, Tensor]:
        """Of data x (B, C, ...): log p (B,) in nats, and the noise (B, C, ...) that the flow takes x to.

        Args:
            model: any `model(x, t (B,), **model_kwargs)` that is differentiable by x.
            noise_fn: draws noise shaped like x, once, whose signs are used.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        signs = noise_fn(x).sign()

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                point = state[0].detach().requires_grad_(True)
                v = self._velocity(model, point, t, model_kwargs or {})
                (slope,) = torch.autograd.grad(v, point, signs)
            return v.detach(), (slope * signs).flatten(1).sum(1)

        ends, gained = self._solve(field, (x, x.new_zeros(len(x))), x.device)
        return self._transport.prior_logp(ends[-1]) + gained[-1], ends[-1]
