"""Trainers to measure: a run's own `Trainer` on random features of the right shape, and batches for its step."""

import gc
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ditfast.config import PRECISIONS, DataConfig, ModelConfig, RunConfig, TrainConfig, TransportConfig
from ditfast.distributed import World
from ditfast.hardware import rate_name
from ditfast.plan import published_config
from ditfast.train import Trainer

TINY = ModelConfig(
    patch_size=2, hidden_size=64, depth=2, num_heads=2, input_size=(8, 8), in_channels=4, num_classes=10
)  # fmt: skip


@dataclass(frozen=True)
class SizedJob:
    """What is trained in a job: a size by name, pixels, images a step and device, a precision policy, where."""

    model: str
    pixels: int
    batch: int
    precision: str
    device: torch.device


def model_config(name: str, pixels: int = 256) -> ModelConfig:
    """The model of `run_config`."""
    return run_config(name, pixels).model


def run_config(name: str, pixels: int = 256) -> RunConfig:
    """The preset of a published model ("DiT-XL/2") on ImageNet's latents at `pixels` squared; "tiny" is TINY.

    "DiT-S/2 of 2 layers" is as wide, but of fewer layers; "tiny SiT-S/2" has TINY's width, depth, heads and classes.
    ConfigError for an unknown name and impossible sizes.
    """
    if name == "tiny":
        return RunConfig(model=TINY)
    published, _, layers = name.removesuffix(" layers").partition(" of ")
    config = published_config(published.removeprefix("tiny "), pixels)
    sizes: dict[str, Any] = {"depth": int(layers)} if layers else {}
    if published.startswith("tiny "):
        sizes = {name: getattr(TINY, name) for name in ("hidden_size", "depth", "num_heads", "num_classes")} | sizes
    return replace(config, model=replace(config.model, **sizes))


def process_of(model: ModelConfig) -> Literal["ddpm", "sit"]:
    """The process that trains a model: SiT's where no variance is returned that a diffusion could read."""
    return "ddpm" if model.returns_sigma else "sit"


def label(model: str, precision: str) -> tuple[str, str]:
    """A size's name in rows, marked under a fast precision policy, and the dtype whose GEMM rate limits it."""
    return model + " fast" * precision.endswith("-fast"), rate_name(PRECISIONS[precision])


def write_features(folder: Path, count: int, model: ModelConfig, seed: int = 0) -> Path:
    """Random latents in fast-DiT's layout, one .npy pair per image; returns the folder."""
    generator = np.random.default_rng(seed)
    features, labels = (folder / f"imagenet256_{kind}" for kind in ("features", "labels"))
    for made in (features, labels):
        made.mkdir(parents=True)
    assert model.input_size is not None and model.in_channels is not None and model.num_classes is not None
    for i in range(count):
        shape = (1, model.in_channels, *model.input_size)
        np.save(features / f"{i}.npy", generator.standard_normal(shape, dtype=np.float32))
        np.save(labels / f"{i}.npy", generator.integers(model.num_classes, size=1))
    return folder


@contextmanager
def trainer_for(
    model: ModelConfig,
    batch_size: int,
    precision: str,
    world: World,
    *,
    images: int = 1,
    workers: int = 0,
    transport: TransportConfig | None = None,
    **options: Any,
) -> Iterator[Trainer]:
    """A Trainer on `images` random features in a temporary folder, whose learning rate is zero: its weights stay.

    None of its weights is zero, as the gates are in a new model: zeros draw less power, and hide errors behind them.
    `transport` is of use to a model of process sit; `options` are those of TrainConfig.
    """
    gc.collect()  # A Trainer refers to itself: the one before would keep its memory beside this one's.
    with tempfile.TemporaryDirectory(prefix="ditfast-bench-") as folder:
        config = RunConfig(
            out=str(Path(folder) / "run"),
            process=process_of(model),
            model=model,
            transport=transport or TransportConfig(),
            data=DataConfig("features", str(write_features(Path(folder) / "data", images, model)), workers=workers),
            train=TrainConfig(batch_size=batch_size, precision=precision, tensorboard=False, **options),
        )
        trainer = Trainer(config, world)
        try:
            trainer.recorder.close()  # its progress bar
            groups = trainer.optimizer.state_tensors()
            fill_zeros(groups["model"].values())
            trainer.optimizer.load_state_tensors(groups)
            trainer.optimizer.schedule(0, factor=0.0)
            yield trainer
        finally:
            trainer.close()


def fill_zeros(weights: Iterable[Tensor]) -> None:
    """Draws those of the weights that are all zero anew, as if trained."""
    for i, weight in enumerate(weights):
        if not weight.any():
            weight.data.normal_(std=0.02, generator=torch.Generator(weight.device).manual_seed(i))


def random_batch(model: ModelConfig, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """What `Trainer.learn` takes of `size` images: (x, y, t, weights, noise, drop), a tenth of the labels dropped."""
    assert model.input_size is not None and model.in_channels is not None and model.num_classes is not None
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    shape = (size, model.in_channels, *model.input_size)
    x, noise = torch.randn(shape, **options), torch.randn(shape, **options)
    y = torch.randint(model.num_classes, (size,), **options)
    unit = process_of(model) == "sit"
    t = torch.rand(size, **options) if unit else torch.randint(1000, (size,), **options)
    return x, y, t, torch.ones(size, device=device), noise, torch.rand(size, **options) < 0.1
