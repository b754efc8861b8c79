"""Noise schedules: beta_t for t = 0 .. T - 1, in float64."""

import difflib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def unknown_name(kind: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is in no table: it says the nearest name and all of them."""
    names = list(known)
    nearest = difflib.get_close_matches(str(given), names, n=1)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"unknown {kind} {given!r};{hint} known: {', '.join(names)}")


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _warmup(start: float, end: float, steps: int, fraction: float) -> Tensor:
    betas = torch.full((steps,), end, dtype=torch.float64)
    warm = int(steps * fraction)
    betas[:warm] = _linspace(start, end, warm)
    return betas


_BETWEEN: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linspace,
    "quad": lambda start, end, steps: _linspace(start**0.5, end**0.5, steps) ** 2,
    "const": lambda start, end, steps: torch.full((steps,), end, dtype=torch.float64),
    "jsd": lambda start, end, steps: 1 / _linspace(steps, 1, steps),
    "warmup10": lambda start, end, steps: _warmup(start, end, steps, 0.1),
    "warmup50": lambda start, end, steps: _warmup(start, end, steps, 0.5),
}
SCHEDULES = (*_BETWEEN, "squaredcos_cap_v2")
_MAX_BETA = 0.999


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> Tensor:
    """Betas (T,) float64 of the DDPM code's schedules: linear, quad, const, jsd, warmup10, warmup50.

    `const` reads only `beta_end`; `jsd` is 1/T .. 1 and reads neither.
    """
    if beta_schedule not in _BETWEEN:
        raise unknown_name("beta schedule", beta_schedule, _BETWEEN)
    return _BETWEEN[beta_schedule](beta_start, beta_end, num_diffusion_timesteps)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = _MAX_BETA
) -> Tensor:
    """Betas (T,) float64 for which the product of (1 - beta) follows `alpha_bar(u)`, u in [0, 1].

    beta_t = 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), at most `max_beta` (Nichol and Dhariwal 2021, section 3.2).
    """
    steps = num_diffusion_timesteps
    bars = [alpha_bar(i / steps) for i in range(steps + 1)]
    return torch.tensor([min(1 - bars[i + 1] / bars[i], max_beta) for i in range(steps)], dtype=torch.float64)


def _squared_cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Tensor:
    """Betas (T,) float64 of a schedule in `SCHEDULES`.

    `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal 2021, equation 17. All others run between 1e-4 and
    0.02 times 1000 / T (Ho et al. 2020, section 4), so that the chain destroys as much of the data at any T. The last
    beta of `jsd` is 0.999 in place of 1, as in the cosine schedule: from pure noise no network could tell x_0.

    Raises:
        ValueError: an unknown name; T < 1; a T so small that a beta would reach 1.
    """
    if schedule_name not in SCHEDULES:
        raise unknown_name("noise schedule", schedule_name, SCHEDULES)
    steps = num_diffusion_timesteps
    if steps < 1:
        raise ValueError(f"a diffusion needs at least 1 step, got {steps}")
    if schedule_name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(steps, _squared_cosine)
    end = 0.02 * 1000 / steps
    if end >= 1 and schedule_name != "jsd":
        raise ValueError(
            f"{schedule_name!r} ends at beta = 20 / T, which is {end:g} for T = {steps} and must stay below 1: "
            "take T > 20, or respace T = 1000"
        )
    start = 1e-4 * 1000 / steps
    betas = get_beta_schedule(schedule_name, beta_start=start, beta_end=end, num_diffusion_timesteps=steps)
    return betas.clamp(max=_MAX_BETA)
