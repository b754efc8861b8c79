"""Loops over known steps: what `Sampler` returns for Euler and Heun, of the ODE or the SDE."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditfast.kernels import guided_step

from ..guidance import unmixed_form
from ..samplers import Step, StepRunner, at_timestep, run_step_directly
from ..types import Model, TensorFn, Unmixed
from .process import checked_output


class FixedSteps(ABC):
    """The steps of one sampler, each of one or two evaluations of the network, as coefficients of `guided_step`.

    Called as officially, `loop(init, model, **model_kwargs)`, it returns the points of the path; `sample` keeps the
    last one alone, and takes the noise. Only the first call on a device waits for it. A model that has `at_timestep`
    is asked by the loop, before each evaluation, for what to call at time t (see `diffusion.samplers`); what a guidance
    mixes is mixed by the step itself.

    Attributes:
        timesteps: the different times in [0, 1] at which the network is evaluated, in order: the very floats that
            `at_timestep` is given.
        evaluations: how often the network is, in all.
    """

    def __init__(self, times: Tensor, table: Tensor) -> None:
        """`times` (S, K) and `table` (S, K, 6) are those of `steps.step_table`."""
        self._times: list[list[float]] = times.tolist()
        self._table = table.flatten(0, 1)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._noisy_steps = 0

    @abstractmethod
    def __call__(self, init: Tensor, model: Model, /, **model_kwargs: Any) -> Tensor | list[Tensor]:
        """All points of the path that starts at init."""

    @property
    def timesteps(self) -> list[float]:
        return list(dict.fromkeys(t for step in self._times for t in step))

    @property
    def evaluations(self) -> int:
        return len(self._table)

    def sample(
        self,
        model: Model,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise_fn: TensorFn = torch.randn_like,
        run_step: StepRunner = run_step_directly,
    ) -> Tensor:
        """The end (B, C, ...) of the path that starts at noise (B, C, ...); arguments as in `progressive`."""
        for x in self.progressive(model, noise, model_kwargs, noise_fn, run_step):
            end = x
        return end

    def progressive(
        self,
        model: Model,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise_fn: TensorFn = torch.randn_like,
        run_step: StepRunner = run_step_directly,
    ) -> Iterator[Tensor]:
        """The points (B, C, ...) of the path, one after each step.

        Args:
            model: any `model(x (B, C, ...), t (B,), **model_kwargs)` -> (B, C, ...), a guidance too.
            noise: where to start; for a reversed ODE the data. Half precision goes on in fp32.
            noise_fn: draws noise shaped like its argument, once a step of an SDE but for its last one.
            run_step: how to run an evaluation and what it does to x, of which a step of Heun has two; see `StepRunner`.

        Raises:
            ValueError: the model returned another shape than that of x.
        """
        key = noise.device, torch.promote_types(noise.dtype, torch.float32)
        if key not in self._tables:
            flat = torch.tensor([t for step in self._times for t in step], dtype=torch.float64)
            self._tables[key] = flat.to(*key), self._table.to(*key)
        advance = partial(_advance, *self._tables[key], model_kwargs=model_kwargs or {})
        x, number = noise.to(key[1]), 0
        for i, times in enumerate(self._times):
            given: tuple[Tensor, ...] = ()
            added = noise_fn if i < self._noisy_steps else None
            for t in times:
                network, at = at_timestep(model, t), torch.full((len(x),), number, device=x.device)
                with torch.no_grad():
                    out = run_step(partial(advance, heun=len(times) == 2), network, x, at, *given, noise_fn=added)
                x, given, added, number = out["sample"], (out["pred_xstart"],), None, number + 1
            yield x


class OdeSteps(FixedSteps):
    """Of the probability flow; deterministic."""

    def __call__(self, init: Tensor, model: Model, /, **model_kwargs: Any) -> Tensor:
        """(S + 1, B, C, ...): init and the points after each of S steps."""
        points = list(self.progressive(model, init, model_kwargs))
        return torch.stack([init.to(points[0].dtype), *points])


class SdeSteps(FixedSteps):
    """Of the SDE, with a noiseless last step or none."""

    def __init__(self, times: Tensor, table: Tensor, last: tuple[float, Tensor] | None) -> None:
        """`last` is the time and the row (6,) of the last step."""
        super().__init__(times, table)
        self._noisy_steps = len(self._times)
        if last is not None:
            self._times.append([last[0]])
            self._table = torch.cat([self._table, last[1][None]])

    def __call__(self, init: Tensor, model: Model, /, **model_kwargs: Any) -> list[Tensor]:
        """The points (B, C, ...) after each step and after the last one; twice the end without a last step."""
        points = list(self.progressive(model, init, model_kwargs))
        return points if len(self._times) > self._noisy_steps else [*points, points[-1]]


def _advance(
    times: Tensor,
    table: Tensor,
    model: Model,
    x: Tensor,
    number: Tensor,
    base: Tensor | None = None,
    *,
    heun: bool,
    noise_fn: TensorFn | None,
    model_kwargs: Mapping[str, Any],
) -> Step:
    """Evaluation `number` (B,) at x (B, C, ...), and the step or half of Heun's step that it allows.

    Heun's first half also returns, as `pred_xstart`, what the second, given it as `base`, adds to.
    """
    row, noise = table.index_select(0, number), None if noise_fn is None else noise_fn(x)
    first = heun and base is None
    if first and noise is not None:
        x, noise = x + row[:, 5].view(-1, *(1,) * (x.ndim - 1)) * noise, None
    output = unmixed_form(model)(x, times.index_select(0, number), **model_kwargs)
    out = output if isinstance(output, Unmixed) else Unmixed(output)
    checked_output(out.cond, x)
    start = x if base is None else base
    x_next, x_start = guided_step(start, out.cond, out.uncond, noise, row, out.scale, keep_x0=first)
    return {"sample": x_next, "pred_xstart": x_next if x_start is None else x_start}
