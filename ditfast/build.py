"""From a configuration to its parts: dataset, model, training process, and what losses and samplers call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditfast.config import ConfigError, DiffusionConfig, ModelConfig, Precision, RunConfig, TransportConfig
from ditfast.data import Dataset, build_dataset
from ditfast.diffusion import (
    SpacedDiffusion,
    Transport,
    create_diffusion,
    create_named_schedule_sampler,
    create_transport,
)
from ditfast.diffusion.timestep_sampler import TimestepSampler, TransportSampler
from ditfast.layers import DiffusionTransformer


def build_data(config: RunConfig) -> Dataset:
    """The training dataset of a configuration."""
    data, model = config.data, config.model
    # Only feature folders need to be told their classes: the others know theirs, and a model may have more.
    classes = model.num_classes if data.kind == "features" else None
    return build_dataset(
        data.kind, data.path, data.image_size, channels=model.in_channels, num_classes=classes, flip=data.flip
    )


def resolve_model(model: ModelConfig, dataset: Dataset) -> ModelConfig:
    """Fills input_size, in_channels and num_classes from the data; ConfigError where given values contradict it."""
    found: dict[str, Any] = {"input_size": tuple(dataset.image_size), "in_channels": dataset.channels}
    for name, value in found.items():
        given = getattr(model, name)
        given = tuple(given) if isinstance(given, list) else given
        if given is not None and given != value:
            raise ConfigError(f"model.{name} is {given}, but the data has {value}; drop the option or change the data")
    classes = model.num_classes if model.num_classes is not None else dataset.num_classes
    if classes < dataset.num_classes:
        raise ConfigError(
            f"model.num_classes is {classes}, but the data has {dataset.num_classes} classes; raise it or leave it out"
        )
    return dataclasses.replace(model, num_classes=classes, **found)


def build_model(model: ModelConfig) -> DiffusionTransformer:
    """A freshly initialized model, fp32; the configuration must have been resolved."""
    if model.input_size is None or model.in_channels is None or model.num_classes is None:
        missing = [f"model.{n}" for n in ("input_size", "in_channels", "num_classes") if getattr(model, n) is None]
        raise ConfigError(f"{', '.join(missing)} must be set where there is no data to take it from")
    return DiffusionTransformer(
        model.architecture,
        model.input_size,
        model.in_channels,
        model.class_dropout_prob,
        model.num_classes,
        model.learn_sigma,
    )


def build_diffusion(config: DiffusionConfig, learn_sigma: bool, respacing: str = "") -> SpacedDiffusion:
    """The diffusion process, all steps for training or respaced ("250", "ddim50") for sampling."""
    arguments = {k: v for k, v in dataclasses.asdict(config).items() if k != "timestep_sampler"}
    return create_diffusion(respacing, learn_sigma=learn_sigma, **arguments)


def build_transport(config: TransportConfig) -> Transport:
    """The interpolant of process sit. ConfigError for options that do not go together."""
    try:
        return create_transport(
            config.path,
            config.prediction,
            config.loss_weight,
            config.train_eps,
            config.sample_eps,
            use_lognorm=config.timestep_sampler == "lognormal",
            use_cosine_loss=config.cosine_loss,
            timestep_shift=config.timestep_shift,
        )
    except ValueError as error:
        raise ConfigError(f"transport: {error}") from error


def build_process(config: RunConfig) -> tuple[SpacedDiffusion | Transport, TimestepSampler, int]:
    """What trains a run: the process, what draws its timesteps, and the end of their range 0 .. T or 0 .. 1."""
    if config.process == "sit":
        transport = build_transport(config.transport)
        return transport, TransportSampler(transport), 1
    diffusion = build_diffusion(config.diffusion, config.model.learn_sigma)
    sampler = create_named_schedule_sampler(config.diffusion.timestep_sampler, diffusion)
    return diffusion, sampler, diffusion.num_timesteps


def predictor(model: Callable[..., Tensor], precision: Precision, device: torch.device) -> Callable[..., Tensor]:
    """`model` as losses and samplers want it: fp32 in and out, the precision policy inside."""

    def predict(*args: Tensor, **kwargs: Tensor) -> Tensor:
        with precision.autocast(device):
            return model(*args, **kwargs).float()

    return predict
