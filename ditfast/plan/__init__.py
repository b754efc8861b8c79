"""What a training run needs, computed before it starts: memory, time and communication, and how to spread it.

memory.py counts bytes, step.py the time of a step on one GPU, layout.py weighs the ways to spread it over many;
command.py is `ditfast plan`, report.py what it prints, against.py how far it is from what was measured. Nothing here
needs a GPU.
"""

import torch

from ditfast.config import PRESETS, ConfigError, nearest
from ditfast.layers import DiT, DiT_models
from ditfast.plan.layout import Candidate, Cluster, Job, Layout, choose, layouts, weigh
from ditfast.plan.memory import POLICIES, MemoryPlan, State, plan_memory, state
from ditfast.plan.step import Rates, Share, StepTime, rates, step_time

# The published models, at 256 pixels or with @512.
MODELS = [name for name in PRESETS if name.partition("@")[0] in DiT_models]


def published_model(name: str, image_size: int | None = None) -> DiT:
    """DiT-XL/2 or DiT-XL/2@512 on the meta device, for `image_size` in pixels, of which it sees latents of an eighth.

    By default 256, or what the name ends in. ConfigError for an unknown model and for impossible sizes.
    """
    network, _, pixels = name.partition("@")
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}{nearest(name, MODELS) or '; known: ' + ', '.join(MODELS)}")
    size = int(pixels or 256) if image_size is None else image_size
    unit = 8 * int(network.rpartition("/")[2])
    if size < unit or size % unit:
        raise ConfigError(f"--image-size of {network} must be a positive multiple of {unit}, got {size}")
    with torch.device("meta"):
        return DiT_models[network](input_size=size // 8)


__all__ = [
    "MODELS", "POLICIES", "Candidate", "Cluster", "Job", "Layout", "MemoryPlan", "Rates", "Share", "State", "StepTime",
    "choose", "layouts", "plan_memory", "published_model", "rates", "state", "step_time", "weigh",
]  # fmt: skip
