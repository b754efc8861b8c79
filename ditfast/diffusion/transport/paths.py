"""Paths x_t = alpha x_1 + sigma x_0 from noise x_0 (t = 0) to data x_1 (t = 1), and what a prediction tells on one.

Ma et al. 2024 (SiT, arXiv:2401.08740), section 2; there time runs from data to noise, here as in the official code.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """A path at t, each shaped like t: alpha, sigma and their derivatives by t.

    score_factor is that of the score in the velocity, v = alpha' / alpha x + score_factor score, so alpha' / alpha
    sigma^2 - sigma sigma'; infinite where alpha is 0.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    score_factor: Tensor

    @property
    def turn(self) -> Tensor:
        """alpha' sigma - alpha sigma', which is positive: x_t and the velocity together tell x_0 and x_1."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


class Affine(NamedTuple):
    """A quantity by_x x + by_pred prediction; both shaped like the path's t."""

    by_x: Tensor
    by_pred: Tensor


def linear(t: Tensor) -> Point:
    """alpha = t, sigma = 1 - t."""
    one = torch.ones_like(t)
    return Point(t, 1 - t, one, -one, (1 - t) / t)


def gvp(t: Tensor) -> Point:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the variance of x_t is 1 where that of the data is."""
    half_pi = math.pi / 2
    # Not cos(pi t / 2), which is not 0 at t = 1.
    alpha, sigma = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
    return Point(alpha, sigma, half_pi * sigma, -half_pi * alpha, half_pi * sigma / alpha)


# beta of Song et al. 2021 (arXiv:2011.13456), appendix C.
_BETA_MIN, _BETA_MAX = 0.1, 20.0


def vp(t: Tensor) -> Point:
    """log alpha = -(1 - t)^2 (20 - 0.1) / 4 - (1 - t) 0.1 / 2, sigma^2 = 1 - alpha^2; sigma' is infinite at t = 1."""
    rest = 1 - t
    log_alpha = -(rest**2) * (_BETA_MAX - _BETA_MIN) / 4 - rest * _BETA_MIN / 2
    slope = rest * (_BETA_MAX - _BETA_MIN) / 2 + _BETA_MIN / 2
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Point(alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma, slope)


PATHS: dict[str, Callable[[Tensor], Point]] = {"Linear": linear, "GVP": gvp, "VP": vp}
PREDICTIONS = ("velocity", "noise", "score")


def velocity_of(prediction: str, at: Point) -> Affine:
    """The velocity d x_t / dt that a network's output means, the drift of the probability flow."""
    if prediction == "velocity":
        return Affine(torch.zeros_like(at.alpha), torch.ones_like(at.alpha))
    ratio = at.d_alpha / at.alpha
    return Affine(ratio, at.score_factor if prediction == "score" else -at.turn / at.alpha)


def noise_of(prediction: str, at: Point) -> Affine:
    """The x_0 that a network's output means; the score, the gradient of log p_t, is -x_0 / sigma."""
    if prediction == "velocity":
        return Affine(at.d_alpha / at.turn, -at.alpha / at.turn)
    return Affine(torch.zeros_like(at.alpha), -at.sigma if prediction == "score" else torch.ones_like(at.alpha))


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t) for t in [0, 1], in the direction of the paths: 0 is noise, 1 is data.

    shift < 1 moves times towards the noise (LightningDiT, arXiv:2501.01423, samples with 0.3), 1 leaves them. The shift
    of Stable Diffusion 3 (arXiv:2403.03206, equation 23), whose t = 1 is noise, is 1 / shift.

    Raises:
        ValueError: shift is not positive and finite.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"timestep_shift must be a finite number > 0, got {shift}; 1 is no shift")
    return shift * t / (shift * t + (1 - t))  # so that 1 stays 1 in any precision
