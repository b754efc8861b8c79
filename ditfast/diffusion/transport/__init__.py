"""SiT's stochastic interpolants: losses, ODE and SDE samplers, likelihood, over any `model(x, t, **kwargs)`."""

from .diffusion_forms import DIFFUSION_FORMS
from .loops import FixedSteps, OdeSteps, SdeSteps
from .ode import OdeLikelihood, OdeSolver
from .paths import PATHS, PREDICTIONS, shift_timesteps
from .process import LOSS_WEIGHTS, Transport, create_transport
from .sampler import Sampler

__all__ = [
    "DIFFUSION_FORMS",
    "LOSS_WEIGHTS",
    "PATHS",
    "PREDICTIONS",
    "FixedSteps",
    "OdeLikelihood",
    "OdeSolver",
    "OdeSteps",
    "Sampler",
    "SdeSteps",
    "Transport",
    "create_transport",
    "shift_timesteps",
]
