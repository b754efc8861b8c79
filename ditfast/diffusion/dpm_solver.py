"""DPM-Solver++(2M): a second-order solver that remembers the last predicted x_0 (arXiv:2211.01095, algorithm 2)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditfast.kernels import guided_step

from .gaussian import GaussianDiffusion
from .samplers import Step, StepRunner, at_timestep, run_step_directly
from .step_table import step_table
from .types import Model


class DpmSolver:
    """Samples of a process by DPM-Solver++(2M), deterministic from the noise on.

    Its steps begin at timesteps equidistant in 0 .. T - 1, but 0, and the last one ends at the predicted x_0, as
    diffusers' DPMSolverMultistepScheduler has it by default. A learned variance is not used.

    Attributes:
        timesteps: of the process, in order.

    Raises ValueError for a number of steps outside 1 .. T - 1.
    """

    def __init__(self, process: GaussianDiffusion, steps: int) -> None:
        most = process.num_timesteps - 1
        if not 1 <= steps <= most:
            raise ValueError(f"dpm-solver++ takes 1 .. {most} steps of a process of {most + 1}, got {steps}")
        self.process = process
        t = torch.linspace(0, most, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]
        self.timesteps: list[int] = t.tolist()
        self._table = _coefficients(process, t)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def sample(
        self,
        model: Model,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        clip_denoised: bool = False,
        run_step: StepRunner = run_step_directly,
    ) -> Tensor:
        """Samples (B, C, ...) from noise of that shape; arguments as in `samplers.p_sample_loop`."""
        key = noise.device, torch.promote_types(noise.dtype, torch.float32)
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.timesteps, device=noise.device), self._table.to(*key)
        step = partial(self._step, *self._tables[key], clip_denoised=clip_denoised, model_kwargs=model_kwargs or {})
        x, last = noise.to(key[1]), tuple[Tensor, ...]()
        for number, t in enumerate(self.timesteps):
            network = at_timestep(model, self.process.timestep_map[t])
            with torch.no_grad():
                out = run_step(step, network, x, torch.full((len(x),), number, device=x.device), *last, noise_fn=None)
            x, last = out["sample"], (out["pred_xstart"],)
        return x

    def _step(
        self,
        timesteps: Tensor,
        table: Tensor,
        model: Model,
        x: Tensor,
        number: Tensor,
        last: Tensor | None = None,
        *,
        clip_denoised: bool,
        model_kwargs: Mapping[str, Any],
        noise_fn: None,
    ) -> Step:
        """Step `number` (B,) at x (B, C, ...), given the x_0 that the one before it predicted."""
        unmixed, _ = self.process.call_unmixed(model, x, timesteps.index_select(0, number), model_kwargs)
        # The op's noise is what it adds some of: here the last x_0.
        x_next, x_start = guided_step(
            x, unmixed.cond[:, : x.shape[1]], unmixed.uncond, last, table.index_select(0, number), unmixed.scale,
            clip_denoised,
        )  # fmt: skip
        assert x_start is not None
        return {"sample": x_next, "pred_xstart": x_start}


def _coefficients(process: GaussianDiffusion, t: Tensor) -> Tensor:
    """(S, 6) float64 rows of `guided_step` of steps from timesteps t (S,) to the next, and at last to x_0.

    With lambda = log(alpha / sigma), h its step and r = h_last / h: x <- sigma' / sigma x + alpha' (1 - e^-h)
    ((1 + 1 / 2r) x_0 - 1 / 2r x_0_last). The first and the last step are of first order.
    """
    bar = process.alphas_cumprod[t]
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    h = (alpha / sigma).log().diff()
    ratio, gain = torch.zeros_like(bar), torch.ones_like(bar)
    ratio[:-1], gain[:-1] = sigma[1:] / sigma[:-1], -alpha[1:] * torch.expm1(-h)
    memory = torch.zeros_like(bar)
    memory[1:-1] = h[1:] / h[:-1] / 2
    x_start = step_table(process, "ddim", 0.0, process.model_mean_type)[t, :2]
    rest = torch.stack([ratio, gain * (1 + memory), torch.zeros_like(bar), -gain * memory], dim=1)
    return torch.cat([x_start, rest], dim=1)
