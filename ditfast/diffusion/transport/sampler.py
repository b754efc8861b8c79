"""`Sampler`: ODE, SDE and likelihood of a transport, with the official arguments."""

import torch
from torch import Tensor

from ..schedules import unknown_name
from .diffusion_forms import Diffusion
from .loops import OdeSteps, SdeSteps
from .ode import TORCHDIFFEQ_METHODS, OdeLikelihood, OdeSolver
from .paths import shift_timesteps
from .process import Transport
from .steps import LAST_STEPS, check_finite, last_row, step_table

# Whether a step is Heun's, by name: the ODE's are torchdiffeq's names, the SDE's the official ones.
_ODE_STEPS = {"euler": False, "heun2": True}
_SDE_STEPS = {"Euler": False, "Heun": True}


class Sampler:
    """Makes samplers of a transport: each method returns a function `sample_fn(init, model, **model_kwargs)`.

    What they return has further methods, for long loops, known noise and modulation ahead: see `FixedSteps`,
    `OdeSolver` and `OdeLikelihood`. As officially, num_steps is the number of points: num_steps - 1 steps lie between.

    All raise ValueError for an unknown name (it says the nearest), less than 2 points, a timestep_shift that is not
    positive, and steps that are not finite (it says which); ImportError for a solver of torchdiffeq where that is
    missing.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        timestep_shift: float = 1.0,
    ) -> OdeSteps | OdeSolver:
        """The probability flow from noise to data; called, it returns all num_steps points, the first of them init.

        Args:
            sampling_method: "euler" or "heun2", of num_steps - 1 steps on fused ops; or a solver of torchdiffeq, of
                which "dopri5" and some others choose their steps by atol and rtol and interpolate the points.
            reverse: from data to noise.
            timestep_shift: moves the points, see `shift_timesteps`.
        """
        times = self._times(self.transport.interval(self.transport.sample_eps), num_steps, timestep_shift)
        times = times.flip(0) if reverse else times
        if sampling_method not in _ODE_STEPS:
            return OdeSolver(self.transport, times, _checked_method(sampling_method), atol, rtol)
        at, table = step_table(self.transport, times, _ODE_STEPS[sampling_method], None)
        check_finite(at, table, "take sample_eps > 0")
        return OdeSteps(at, table)

    def sample_ode_likelihood(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3
    ) -> OdeLikelihood:
        """The log density of data, by the probability flow; called with data, it returns (log p (B,), noise).

        sampling_method is any solver of torchdiffeq.
        """
        times = self._times(self.transport.interval(self.transport.sample_eps), num_steps, 1.0).flip(0)
        return OdeLikelihood(self.transport, times, _checked_method(sampling_method), atol, rtol)

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
        timestep_shift: float = 1.0,
    ) -> SdeSteps:
        """The SDE from noise to data; called, it returns a list of num_steps points, init not among them.

        The network is evaluated once a step, where the official code evaluates it for the drift and for the score.

        Args:
            sampling_method: "Euler" (Euler-Maruyama) or "Heun".
            diffusion_form: w(t), one of `DIFFUSION_FORMS`. The official "constant" and "increasing-decreasing" raise.
                SBDM, alpha' / alpha sigma^2 - sigma sigma', is infinite at t = 0 of a velocity on Linear and GVP: the
                first step is then the ODE's.
            diffusion_norm: the magnitude of w.
            last_step: from 1 - last_step_size to 1 without noise: the SDE's "Mean", the ODE's "Euler", or "Tweedie",
                the predicted data. None leaves it away, and ends at 1 - sample_eps.
            timestep_shift: moves the points before the last step, see `shift_timesteps`.
        """
        transport, diffusion = self.transport, Diffusion(diffusion_form, diffusion_norm)
        diffusion.check()
        if sampling_method not in _SDE_STEPS:
            raise unknown_name("sampling_method", sampling_method, _SDE_STEPS)
        if last_step not in LAST_STEPS:
            raise unknown_name("last_step", last_step, map(str, LAST_STEPS))
        if not 0 <= last_step_size < 1:
            raise ValueError(f"last_step_size must be in [0, 1), got {last_step_size}")
        size = 0.0 if last_step is None else last_step_size
        times = self._times(transport.interval(transport.sample_eps, size), num_steps, timestep_shift)
        at, table = step_table(transport, times, _SDE_STEPS[sampling_method], diffusion)
        remedy = "take sample_eps > 0, or a last_step of some size"
        check_finite(at, table, remedy)
        if last_step is None:
            return SdeSteps(at, table, None)
        row = last_row(transport, last_step, times[-1], size, diffusion)
        check_finite(times[-1:], row[None], remedy)
        return SdeSteps(at, table, (float(times[-1]), row))

    def _times(self, interval: tuple[float, float], num_steps: int, shift: float) -> Tensor:
        """(num_steps,) float64 times, equidistant but for the shift."""
        if num_steps < 2:
            raise ValueError(f"num_steps is the number of points, of which there must be at least 2, got {num_steps}")
        t0, t1 = interval
        if not t0 < t1:
            raise ValueError(f"sampling runs from t = {t0} to t = {t1}: lower sample_eps or last_step_size")
        return shift_timesteps(torch.linspace(0, 1, num_steps, dtype=torch.float64), shift) * (t1 - t0) + t0


def _checked_method(name: str) -> str:
    if name not in TORCHDIFFEQ_METHODS:
        raise unknown_name("sampling_method", name, TORCHDIFFEQ_METHODS)
    return name
