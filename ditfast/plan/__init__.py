"""What a training run needs, computed before it starts: memory, time and communication, and how to spread it.

memory.py counts bytes, step.py the time of a step on one GPU, layout.py weighs the ways to spread it over many;
command.py is `ditfast plan`, report.py what it prints, against.py how far it is from what was measured. Nothing here
needs a GPU.
"""

from dataclasses import replace

import torch

from ditfast.build import build_data, build_model, resolve_model
from ditfast.config import PRESETS, ConfigError, RunConfig, nearest, parse_config
from ditfast.layers import DiffusionTransformer
from ditfast.plan.layout import Candidate, Cluster, Job, Layout, choose, layouts, weigh
from ditfast.plan.memory import POLICIES, MemoryPlan, State, plan_memory, state
from ditfast.plan.step import Rates, Share, StepTime, rates, step_time
from ditfast.presets import PUBLISHED


def published_config(name: str, image_size: int | None = None) -> RunConfig:
    """The preset of DiT-XL/2, DiT-XL/2@512, SiT-B/4, digits, ... with a model for `image_size` in pixels.

    By default 256, or what the name ends in; the digits have their own. ConfigError for an unknown model and for
    impossible sizes.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}{nearest(name, PRESETS) or '; known: ' + ', '.join(PRESETS)}")
    network, _, pixels = name.partition("@")
    config = parse_config(["--preset", name])
    if network not in PUBLISHED:
        model = resolve_model(config.model, build_data(config))
        if image_size not in (None, *(model.input_size or ())):
            raise ConfigError(f"--image-size of {name} is that of its data, {model.input_size}; leave it out")
        return replace(config, model=model)
    own, (side, _) = int(pixels or 256), config.model.input_size or (0, 0)
    size, latent = own if image_size is None else image_size, own // side
    unit = latent * config.model.patch_size
    if size < unit or size % unit:
        raise ConfigError(f"--image-size of {network} must be a positive multiple of {unit}, got {size}")
    return replace(config, model=replace(config.model, input_size=(size // latent, size // latent)))


def published_model(name: str, image_size: int | None = None) -> DiffusionTransformer:
    """The model of `published_config` on the meta device."""
    model = published_config(name, image_size).model
    with torch.device("meta"):
        return build_model(model)


__all__ = [
    "POLICIES", "Candidate", "Cluster", "Job", "Layout", "MemoryPlan", "Rates", "Share", "State", "StepTime",
    "choose", "layouts", "plan_memory", "published_config", "published_model", "rates", "state", "step_time", "weigh",
]  # fmt: skip
