"""Steps between known times, for the ODE and the SDE, as coefficients of `ditfast.kernels.guided_step`.

dx = v dt for the probability flow; dx = (v + w score) dt + sqrt(2 w) dW for any w(t) >= 0 has the same distributions at
every t (SiT, arXiv:2401.08740, section 2). v and score are affine in x and the network's output, so a step is too.
"""

import torch
from torch import Tensor

from .diffusion_forms import Diffusion
from .paths import Affine, Point, noise_of, velocity_of
from .process import Transport

LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


def _drift(transport: Transport, at: Point, w: Tensor | None) -> Affine:
    """v + w score, of the ODE where w is None."""
    v = velocity_of(transport.prediction, at)
    if w is None:
        return v
    x_0, by_score = noise_of(transport.prediction, at), -w / at.sigma
    return Affine(v.by_x + by_score * x_0.by_x, v.by_pred + by_score * x_0.by_pred)


def _row(next_x: Tensor, next_pred: Tensor, std: Tensor | float = 0.0, x0: Affine | None = None) -> Tensor:
    """(S, 6) coefficients; the op's x_0 is any second affine form of x and the output."""
    zero = torch.zeros_like(next_x)
    x0 = x0 or Affine(zero, zero)
    return torch.stack([*x0, next_x, zero, next_pred, std + zero], dim=-1)


def step_table(transport: Transport, times: Tensor, heun: bool, diffusion: Diffusion | None) -> tuple[Tensor, Tensor]:
    """(times (S, K), coefficients (S, K, 6)) of the K = 1 or 2 evaluations of each of S steps between times (S + 1,).

    Column 5 of a step's first row is the standard deviation of its noise. Euler adds it with the step. Heun adds it to
    x before the first evaluation, whose x_next is then where to evaluate second, and whose x_0 is what the second row
    adds to. All float64. An SDE's step from where w is infinite is one of the ODE: only x_0's distribution lives there,
    of which x is a draw, and infinite noise would only draw another.
    """
    dt = times.diff()
    start, end = transport.at(times[:-1]), transport.at(times[1:])
    w_start = w_end = None
    std: Tensor | float = 0.0
    if diffusion is not None:
        w_start, w_end = diffusion(times[:-1], start), diffusion(times[1:], end)
        finite = w_start.isfinite()
        w_start, w_end = torch.where(finite, w_start, 0.0), torch.where(finite, w_end, 0.0)
        std = (2 * w_start * dt).sqrt()
    a, b = _drift(transport, start, w_start)
    euler = Affine(1 + dt * a, dt * b)
    if not heun:
        return times[:-1, None], _row(*euler, std)[:, None]
    a_end, b_end = _drift(transport, end, w_end)
    half = dt / 2
    base = Affine(1 + half * a + half * a_end * euler.by_x, half * b + half * a_end * euler.by_pred)
    second = _row(torch.ones_like(dt), half * b_end)
    return torch.stack([times[:-1], times[1:]], dim=1), torch.stack([_row(*euler, std, base), second], dim=1)


def last_row(transport: Transport, kind: str, t: Tensor, size: float, diffusion: Diffusion) -> Tensor:
    """(6,) coefficients of an SDE's noiseless end at t (): the SDE's mean, the ODE, or the predicted data x_1."""
    at = transport.at(t)
    if kind == "Tweedie":
        by_x, by_pred = noise_of(transport.prediction, at)
        return _row((1 - at.sigma * by_x) / at.alpha, -at.sigma * by_pred / at.alpha)
    a, b = _drift(transport, at, diffusion(t, at) if kind == "Mean" else None)
    return _row(1 + size * a, size * b)


def check_finite(times: Tensor, coefficients: Tensor, remedy: str) -> None:
    """ValueError that names the times (...) at which some of their coefficients (..., N) are not finite."""
    bad = ~coefficients.isfinite()
    # Of a Heun step, x_0 tells of its end, which has a row of its own.
    named = bad[..., 2:] if bad[..., 2:].any() else bad
    if bad.any():
        at = times[named.any(dim=-1)].unique().tolist()
        raise ValueError(f"the drift is infinite or undefined at t = {at}: {remedy}")
