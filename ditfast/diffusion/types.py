"""Names shared by the diffusion modules: what a network predicts, how it is trained, what it may return."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from ditfast.kernels.guided_step import guide

Model = Callable[..., Any]
"""`model(x (B, C, ...), t (B,) int64, **model_kwargs)` -> (B, C or 2C, ...), or a tuple of that and an extra."""
ConditionFn = Callable[..., Tensor]
"""`cond_fn(x (B, C, ...), t (B,) int64, **model_kwargs)` -> (B, C, ...), the gradient of log p(y | x_t) by x."""
TensorFn = Callable[[Tensor], Tensor]


class ModelMeanType(enum.Enum):
    """What the first C output channels of a network are."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of p(x_{t-1} | x_t) comes from.

    FIXED_SMALL is the posterior variance and FIXED_LARGE is beta_t (Ho et al. 2020, section 3.2). LEARNED reads a log
    variance from the last C output channels; LEARNED_RANGE reads there the position v in [-1, 1] between the two fixed
    log variances (Nichol and Dhariwal 2021, equation 15).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    @property
    def is_learned(self) -> bool:
        """Whether the network has 2C output channels."""
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """What is minimized: an MSE (with the bound's term for a learned variance) or the variational bound alone.

    RESCALED_MSE weights the bound's term by T / 1000; RESCALED_KL multiplies the bound's term by T, which estimates the
    whole bound from one step.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


@dataclass(frozen=True)
class Unmixed:
    """What one network returned, or what the two of a guidance did, so that a sampler's step can mix as it goes.

    cond (B, C or 2C, ...); uncond (B, G, ...), for the first G channels that are guided by `scale`, or None.
    """

    cond: Tensor
    uncond: Tensor | None = None
    scale: float = 1.0

    def mixed(self) -> Tensor:
        """The guided output, shaped like cond."""
        return guide(self.cond, self.uncond, self.scale)


class Moments(TypedDict):
    """What `p_mean_variance` returns; every tensor is shaped like x_t, `extra` is what the model returned beside."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    extra: Any
