"""Loops over known steps: what `Sampler` returns for Euler and Heun, of the ODE or the SDE."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ditfast.kernels import guided_step

from ..guidance import unmixed_form
from ..samplers import at_timestep
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
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
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
    ) -> Tensor:
        """The end (B, C, ...) of the path that starts at noise (B, C, ...); arguments as in `progressive`."""
        for x in self.progressive(model, noise, model_kwargs, noise_fn):
            end = x
        return end

    def progressive(
        self,
        model: Model,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise_fn: TensorFn = torch.randn_like,
    ) -> Iterator[Tensor]:
        """The points (B, C, ...) of the path, one after each step.

        Args:
            model: any `model(x (B, C, ...), t (B,), **model_kwargs)` -> (B, C, ...), a guidance too.
            noise: where to start; for a reversed ODE the data. Half precision goes on in fp32.
            noise_fn: draws noise shaped like its argument, once a step of an SDE but for its last one.

        Raises:
            ValueError: the model returned another shape than that of x.
        """
        key = noise.device, torch.promote_types(noise.dtype, torch.float32)
        if key not in self._tables:
            self._tables[key] = self._table.to(*key)
        rows = iter(self._tables[key][:, None].expand(-1, len(noise), -1))
        x = noise.to(key[1])
        for i, times in enumerate(self._times):
            with torch.no_grad():
                added = noise_fn(x) if i < self._noisy_steps else None
                x = _step(model, x, times, rows, added, model_kwargs or {})
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


def evaluate(model: Model, x: Tensor, t: float, kwargs: Mapping[str, Any]) -> Unmixed:
    """What the network, or those of a guidance, say of x (B, C, ...) at time t."""
    times = torch.full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    output = unmixed_form(at_timestep(model, t))(x, times, **kwargs)
    unmixed = output if isinstance(output, Unmixed) else Unmixed(output)
    checked_output(unmixed.cond, x)
    return unmixed


def _step(
    model: Model, x: Tensor, times: list[float], rows: Iterator[Tensor], noise: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor:
    row, heun = next(rows), len(times) == 2
    if heun and noise is not None:
        x, noise = x + row[:, 5].view(-1, *(1,) * (x.ndim - 1)) * noise, None
    out = evaluate(model, x, times[0], kwargs)
    x_next, base = guided_step(x, out.cond, out.uncond, noise, row, out.scale, keep_x0=heun)
    if base is None:
        return x_next
    out = evaluate(model, x_next, times[1], kwargs)
    return guided_step(base, out.cond, out.uncond, None, next(rows), out.scale, keep_x0=False)[0]
