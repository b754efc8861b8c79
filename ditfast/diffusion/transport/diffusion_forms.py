"""How much noise an SDE adds: w(t) in dx = (v + w score) dt + sqrt(2 w) dW, by name."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules import unknown_name
from .paths import Point

DIFFUSION_FORMS: dict[str, Callable[[Tensor, Point, float], Tensor]] = {
    "constant": lambda t, at, norm: torch.full_like(t, norm),
    "SBDM": lambda t, at, norm: norm * at.score_factor,
    "sigma": lambda t, at, norm: norm * at.sigma,
    "linear": lambda t, at, norm: norm * (1 - t),
    "decreasing": lambda t, at, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, at, norm: norm * torch.sin(math.pi * t) ** 2,
}


class Diffusion(NamedTuple):
    """w(t) of an SDE: a name in DIFFUSION_FORMS, and its magnitude."""

    form: str
    norm: float

    def __call__(self, t: Tensor, at: Point) -> Tensor:
        """w at t, shaped like t. That of SBDM, beta / 2 on VP, is infinite at t = 0 of Linear and GVP."""
        return DIFFUSION_FORMS[self.form](t, at, self.norm)

    def check(self) -> None:
        """ValueError for an unknown form, or a norm that is negative or not finite."""
        check_form(self.form)
        if not (math.isfinite(self.norm) and self.norm >= 0):
            raise ValueError(f"diffusion_norm must be a finite number >= 0, got {self.norm}")


def check_form(name: str) -> None:
    """ValueError for a name that is not in DIFFUSION_FORMS."""
    if name not in DIFFUSION_FORMS:
        raise unknown_name("diffusion_form", name, DIFFUSION_FORMS)
