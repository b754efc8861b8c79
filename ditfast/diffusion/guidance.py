"""Guidance: callables that stand where a model stands and mix a conditional with an unconditional prediction.

eps = eps_uncond + scale * (eps_cond - eps_uncond), scale = 1 + w (Ho and Salimans 2022, equation 6). A learned variance
is always the conditional one. A process asks for `unmixed` in place of calling, and its samplers mix as they step.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .types import Model, Unmixed


def _checked_weight(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"guidance {name} must be a finite number >= 0, got {value}")
    return float(value)


def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = interval
    if not low < high:
        raise ValueError(f"guidance interval (lo, hi) needs lo < hi, in the t of the model, got {interval}")
    return low, high


def _check_output(name: str, out: Tensor, x: Tensor) -> None:
    if len(out) != len(x) or out.shape[1] not in (x.shape[1], 2 * x.shape[1]):
        raise ValueError(
            f"the {name} model returned shape {tuple(out.shape)} for x of shape {tuple(x.shape)}: "
            f"expected C={x.shape[1]} channels or, with a learned sigma, 2*C={2 * x.shape[1]}"
        )


_OPTION = (float, int, tuple, type(None))


class _Guidance(ABC):
    """What both kinds share: the interval, and the mixing of the two predictions."""

    def __init__(self, scale: float, channels: int | None, interval: tuple[float, float] | None) -> None:
        if channels is not None and channels < 1:
            raise ValueError(f"guided channels must be at least 1, or None for all, got {channels}")
        self.scale = scale
        self.channels = channels
        self.interval = _checked_interval(interval)

    @abstractmethod
    def _conditional(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """The conditional output alone."""

    @abstractmethod
    def _both(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional output."""

    def _guided(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Unmixed:
        if len(y) != len(x):
            raise ValueError(f"{len(x)} samples need {len(x)} labels, got {len(y)}: guidance doubles the batch itself")
        channels = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
        cond, uncond = self._both(x, t, y, **kwargs)
        _check_output("conditional", cond, x)
        _check_output("unconditional", uncond, x)
        return Unmixed(cond, uncond[:, :channels], self.scale)

    def only_mixes(self) -> bool:
        """Whether a call is the mixing of `unmixed` and nothing more, which a subclass may have made of it."""
        return type(self).__call__ is _Guidance.__call__

    def at_timestep(self, t: float) -> Model:
        """The callable for a batch that is all at timestep t: guided inside the interval, else conditional."""
        if self.interval is None or not self.only_mixes():
            return self
        if not self.interval[0] <= t < self.interval[1]:
            return self._conditional
        everywhere = copy.copy(self)
        everywhere.interval = None
        return everywhere

    def parts(self) -> tuple[Any, ...]:
        """What tells this guidance from another one: its class, options and networks."""
        return type(self), *sorted((name, v if isinstance(v, _OPTION) else id(v)) for name, v in vars(self).items())

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """Guided output (N, C or 2C, ...) for x (N, C, ...), timesteps t (N,) and labels y (N,).

        With an interval this reads t on the host; the sampling loops avoid that wait by `at_timestep`.
        """
        return self.unmixed(x, t, y, **kwargs).mixed()

    def unmixed(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Unmixed:
        """The predictions that a call mixes; mixed already for a batch that lies in the interval only in part."""
        if self.interval is None:
            return self._guided(x, t, y, **kwargs)
        inside = (t >= self.interval[0]) & (t < self.interval[1])
        if bool(inside.all()):
            return self._guided(x, t, y, **kwargs)
        conditional = self._conditional(x, t, y, **kwargs)
        if not bool(inside.any()):
            return Unmixed(conditional)
        guided = self._guided(x, t, y, **kwargs).mixed()
        return Unmixed(torch.where(inside.view(-1, *(1,) * (x.ndim - 1)), guided, conditional))


def key_of(model: Model) -> Any:
    """What two models have in common if a recorded step of one is a step of the other: guidances may be equal copies.

    Any other model is like none but itself, a method like that of an equal guidance.
    """
    owner = getattr(model, "__self__", None)
    if owner is not None:
        return key_of(owner), getattr(model, "__func__", id(model))
    return model.parts() if isinstance(model, _Guidance) else id(model)


def unmixed_form(model: Model) -> Callable[..., Any]:
    """The `unmixed` of a guidance that only mixes; any other model itself, a wrapper around a guidance too."""
    return model.unmixed if isinstance(model, _Guidance) and model.only_mixes() else model


class ClassifierFreeGuidance(_Guidance):
    """Guidance by one network that also knows a null class (Ho and Salimans 2022).

    Called as `guided(x (N, C, ...), t (N,), y=labels (N,))` it runs the network on 2N samples and returns N outputs,
    equal to the first half of the official `forward_with_cfg`. Outside the interval it runs the N conditional ones
    alone. A chain's noise is drawn for N samples, where the official sampler draws it for 2N and drops half.

    Args:
        model: any `model(x, t, y=labels, **kwargs)` with C or 2C output channels; other arguments are handed on as
            they are.
        scale: 1 is no guidance, 0 the unconditional model.
        null_class: the label that stands for no class (`num_classes` in a DiT).
        channels: how many of the C predicted channels are guided, the others staying conditional. 3 is what the
            official sampler does, and what its published FIDs used; None guides all, and so does a number beyond C.
        interval: (lo, hi) in the t that models are given, guided where lo <= t < hi (Kynkaanniemi et al. 2024); None
            is everywhere. That t is the original timestep, or a transport's time, in which (0.1, inf) leaves out the
            noisiest tenth.

    Raises:
        ValueError: a scale that is negative or not finite, an interval with lo >= hi, channels below 1, labels of
            another number than samples, a model with other output channels.
    """

    def __init__(
        self,
        model: Model,
        scale: float,
        null_class: int,
        channels: int | None = 3,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(_checked_weight("scale", scale), channels, interval)
        self.model = model
        self.null_class = null_class

    def _conditional(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        return self.model(x, t, y=y, **kwargs)

    def _both(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        out = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels, **kwargs)
        return out[: len(x)], out[len(x) :]


class TwoNetworkGuidance(_Guidance):
    """Guidance by a conditional and a separate unconditional network.

    eps = (1 + weight) eps_cond - weight eps_uncond on all C channels (Ho and Salimans 2022, equation 6): weight 0 is
    the conditional network alone, and a larger weight goes further away from the unconditional one. A learned variance
    is the conditional network's, so the unconditional one may have none.

    Args:
        cond_model: any `model(x, t, y=labels, **kwargs)` with C or 2C output channels.
        uncond_model: a network that is called with `y=null_class` for all samples, or, where `null_class` is None,
            without y.
        weight: w >= 0.
        interval: as in `ClassifierFreeGuidance`.

    Raises:
        ValueError: a weight that is negative or not finite, and as in `ClassifierFreeGuidance`.
    """

    def __init__(
        self,
        cond_model: Model,
        uncond_model: Model,
        weight: float,
        null_class: int | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(1 + _checked_weight("weight", weight), None, interval)
        self.cond_model = cond_model
        self.uncond_model = uncond_model
        self.null_class = null_class

    def _conditional(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        return self.cond_model(x, t, y=y, **kwargs)

    def _both(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        label = {} if self.null_class is None else {"y": torch.full_like(y, self.null_class)}
        return self._conditional(x, t, y, **kwargs), self.uncond_model(x, t, **label, **kwargs)
