"""Diffusion processes, losses, samplers and guidance over any callable `model(x, t, **model_kwargs)`."""

from .gaussian import GaussianDiffusion
from .guidance import ClassifierFreeGuidance, TwoNetworkGuidance
from .respacing import SpacedDiffusion, create_diffusion, space_timesteps
from .schedules import SCHEDULES, betas_for_alpha_bar, get_beta_schedule, get_named_beta_schedule
from .timestep_sampler import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler
from .transport import Sampler, Transport, create_transport, shift_timesteps
from .types import LossType, ModelMeanType, ModelVarType

__all__ = [
    "SCHEDULES",
    "ClassifierFreeGuidance",
    "GaussianDiffusion",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "Sampler",
    "SpacedDiffusion",
    "Transport",
    "TwoNetworkGuidance",
    "UniformSampler",
    "betas_for_alpha_bar",
    "create_diffusion",
    "create_named_schedule_sampler",
    "create_transport",
    "get_beta_schedule",
    "get_named_beta_schedule",
    "shift_timesteps",
    "space_timesteps",
]
