"""Presets: overrides of a run's defaults by dotted key, the published models among them."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ditfast.layers import Architecture, DiT_models, LargeDiT_models, LightningDiT_models, NormForm, SiT_models

PUBLISHED: dict[str, Any] = {**DiT_models, **SiT_models, **LargeDiT_models, **LightningDiT_models}

# The demo's: 8 x 8 scans, minutes on a CPU.
DIGITS: dict[str, Any] = {
    "out": "runs/digits", "data.kind": "digits",
    "model.patch_size": 2, "model.hidden_size": 128, "model.depth": 4, "model.num_heads": 4,
    "diffusion.noise_schedule": "squaredcos_cap_v2",
    "optim.lr": 2e-3, "optim.schedule": "cosine", "optim.warmup_steps": 100, "optim.clip_norm": 1.0,
    "optim.ema_rates": [0.999], "optim.ema_warmup": True,
    "train.steps": 1000, "train.batch_size": 128, "train.precision": "fp32",
    "train.recompute": "none",  # memory does not matter here, and `ops` would cost 8 % of a step or more
    "train.log_every": 50, "train.sample_every": 500, "train.save_every": 500,
    "sample.sampler": "ddim", "sample.steps": 50, "sample.guidance_scale": 2.0, "sample.guidance_channels": None,
    "sample.batch_size": 100, "sample.clip_denoised": True,
}  # fmt: skip
DIGITS_SIT: dict[str, Any] = {key: value for key, value in DIGITS.items() if not key.startswith("diffusion.")} | {
    "out": "runs/digits-sit", "process": "sit", "model.learn_sigma": False,
    "sample.sampler": "ode", "sample.clip_denoised": False,
}  # fmt: skip


def published(name: str, pixels: int) -> dict[str, Any]:
    """A model of a paper at `pixels` squared and its recipe, on latents from fast-DiT's feature folders."""
    make = PUBLISHED[name]
    with torch.device("meta"):  # one block: the others cost time and tell nothing
        model = make(depth=1)
    architecture = dataclasses.replace(model.architecture, depth=make.keywords["depth"])
    lightning = name.startswith("LightningDiT")
    side = pixels // (16 if lightning else 8)
    sit = {"process": "sit"} if lightning or name in SiT_models else {}
    return {
        **{f"model.{key}": value for key, value in _leaves(architecture)},
        "model.learn_sigma": model.learn_sigma, "model.in_channels": model.in_channels,
        "model.input_size": (side, side), "model.num_classes": 1000,
        "data.kind": "features", "out": f"runs/{name.replace('/', '-')}-{pixels}",
        **sit, **(LIGHTNING_RECIPE if lightning else {}),
    }  # fmt: skip


# The official configuration of LightningDiT-XL/1, 64 epochs; guidance is that of the weights of 800 epochs (FID 1.35).
LIGHTNING_RECIPE = {
    "transport.timestep_sampler": "lognormal", "transport.cosine_loss": True,
    "optim.lr": 2e-4, "optim.beta2": 0.95,
    "train.steps": 80_000, "train.batch_size": 1024, "train.save_every": 20_000,
    "sample.timestep_shift": 0.3, "sample.guidance_scale": 6.7, "sample.guidance_interval": (0.125, 1.0),
}  # fmt: skip


def _leaves(architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """The architecture's options by key; a norm's as `norm.kind` and so on."""
    for f in dataclasses.fields(architecture):
        value = getattr(architecture, f.name)
        if f.type is NormForm:
            yield from ((f"{f.name}.{key}", v) for key, v in dataclasses.asdict(value).items())
        else:
            yield f.name, dataclasses.asdict(value) if isinstance(value, NormForm) else value


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "digits": DIGITS.copy,
    "digits-sit": DIGITS_SIT.copy,
    **{
        name + ("" if pixels == 256 else f"@{pixels}"): partial(published, name, pixels)
        for name in PUBLISHED
        for pixels in ((256, 512) if name in DiT_models or name in SiT_models else (256,))
    },
}
