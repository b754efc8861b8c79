"""Sampling: weights from a run or an official checkpoint, labels in, images or latents out."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditfast import checkpoint, convert
from ditfast.build import build_model, predictor
from ditfast.config import (
    PRECISIONS,
    ConfigError,
    Precision,
    RunConfig,
    SampleConfig,
    checked_precision,
    config_from,
    load_config,
    parse_config,
)
from ditfast.cuda_graph import StepGraph, check_cuda_graph
from ditfast.diffusion import ClassifierFreeGuidance, TwoNetworkGuidance
from ditfast.images import save_grid, save_npz, to_uint8
from ditfast.layers import DiffusionTransformer
from ditfast.layers.embed import check_labels
from ditfast.logs import log
from ditfast.modulation import ByTimestep, ModulationTable
from ditfast.optimizer import choose_rate, ema_group
from ditfast.reproducibility import generator_for
from ditfast.sampling_loops import Loop, build_loop


@dataclass
class Network:
    """A model ready to sample: evaluated as `predict(x, t, y=labels)`, with what it was trained on."""

    model: DiffusionTransformer
    precision: Precision
    device: torch.device

    @property
    def num_classes(self) -> int:
        return self.model.y_embedder.num_classes

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        return predictor(self.model, self.precision, self.device)(x, t, **kwargs)


class LoopNetwork(Network):
    """A network for the steps of one loop after the other, with modulation ahead where the options say so.

    Of each loop it must be told the timesteps and the labels before, and of each step the timestep; not of one whose
    steps are not `known_steps`. ConfigError where a CUDA graph is asked for and cannot hold it.
    """

    def __init__(self, network: Network, options: SampleConfig, known_steps: bool = True):
        super().__init__(network.model, network.precision, network.device)
        obstacle = network.model.modulation_obstacle() if options.modulation_ahead else None
        if options.modulation_ahead and not known_steps:
            obstacle = "the solver chooses its steps as it goes"
        if obstacle is not None:
            log.info("modulation is computed in every step: %s", obstacle)
        self._table: ModulationTable | None = None
        forward: Callable[..., Tensor] = self.model
        if options.modulation_ahead and obstacle is None:
            forward, labels = self.model.forward_modulated, self.num_classes + 1
            row_bytes = self.model.modulation_width * self.precision.compute.itemsize
            most = min(options.batch_size + 1, labels)
            self._table = ModulationTable(self._modulations, labels, most, self.device, row_bytes)
        self._run = predictor(forward, self.precision, self.device)
        if options.cuda_graph:
            check_cuda_graph("sample.cuda_graph", self.device, self.model)

    def begin(self, timesteps: Sequence[float] | None, labels: Tensor) -> None:
        """A loop over timesteps as models are told them, in which only these labels (N,), on the CPU, occur."""
        if self._table is not None and timesteps is not None:
            self._table.begin(timesteps, labels.unique())

    def go_to(self, t: float) -> None:
        """The next step is at timestep t."""
        if self._table is not None:
            self._table.go_to(t)

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor) -> Tensor:  # type: ignore[override]
        return self._run(x, t, y) if self._table is None else self._run(x, self._table(y))

    def _modulations(self, t: Tensor, y: Tensor) -> Tensor:
        with self.precision.autocast(self.device):
            return self.model.modulations(t, y)


@dataclass
class Weights:
    """Tensors by group, and the configuration that they belong to, as `open_weights` found them."""

    config: RunConfig
    groups: dict[str, dict[str, Tensor]]
    origin: str


def open_weights(path: str | Path, config: str | Path | None = None, process: str | None = None) -> Weights:
    """Reads a run's newest sound checkpoint, one of its step-... directories, or an official file.

    A checkpoint carries its configuration. An official file (.pt, .safetensors; its ema where it has one) tells only
    the shapes of a published size: of DiT, or with `process` "sit" of SiT, which has the same names; of LargeDiT or
    LightningDiT. It is then of the published process. For others `config` names a run's YAML.
    Raises CheckpointError, ConvertError or ConfigError.
    """
    path = Path(path)
    if path.is_dir() and config is not None:
        raise ConfigError(f"{path} is a run, which carries its configuration; --config is for files")
    if process is not None and (path.is_dir() or config is not None):
        raise ConfigError(f"{config or path} says which process it is; --process is for files without --config")
    if path.is_dir():
        loaded = checkpoint.load(path)
        return Weights(config_from(loaded.state["config"]), loaded.tensors, f"step {loaded.step} of {loaded.path}")
    state, info = convert.load_official(path)
    origin = f"{path} ({info['which']})"
    run = load_config(config) if config is not None else _published_run(path, state, process)
    return Weights(run, {"model": state}, origin)


def _published_run(path: Path, state: dict[str, Tensor], process: str | None) -> RunConfig:
    """The configuration of a published model, by the shapes of its weights."""
    found = convert.infer_config(state)
    name, side = found["preset"], found["input_size"]
    if name is None or (side is None and "pos_embed" in state):
        raise ConfigError(
            f"{path} is no published size of DiT, SiT, LargeDiT or LightningDiT, so its heads and height are unknown; "
            "name the configuration of its run, --config runs/.../config.yaml, or a YAML file that says its `model:`"
        )
    if process == "sit" and name.startswith("DiT-"):
        name = f"SiT-{name.removeprefix('DiT-')}"
    told = ("in_channels", "num_classes", "learn_sigma", "mlp_ratio", "kv_heads", "qk_norm", "position")
    options = {key: found[key] for key in told if key in found} | ({"input_size": [side, side]} if side else {})
    if process == "sit":
        options["returns_sigma"] = False
    arguments = [f"--model.{key}={json.dumps(value)}" for key, value in options.items()]
    return parse_config([*arguments, *([f"--process={process}"] if process else [])], name)


def load_network(
    weights: Weights, device: torch.device, precision: str | None = None, ema: float | None = None
) -> Network:
    """The network of `weights`, in its run's precision or another, with the EMA of rate `ema`.

    None takes the run's first EMA, 0 the raw weights. Raises ConvertError or ConfigError.
    """
    config = weights.config
    policy = PRECISIONS[checked_precision(precision or config.train.precision)]
    kept = [rate for rate in config.optim.ema_rates if ema_group(rate) in weights.groups]
    rate = choose_rate(ema, kept, weights.origin)
    group = ema_group(rate) if rate else "model"
    log.info("%s weights of %s", group, weights.origin)
    model = build_model(config.model)
    own = model.state_dict()
    # A run's checkpoint holds trainable tensors only; the frozen tables of positions are the model's own.
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: value for name, value in own.items() if name not in trainable}
    state, notes = convert.fit_state_dict(frozen | weights.groups[group], own)
    for note in notes:
        log.info("%s: %s", weights.origin, note)
    model.load_state_dict(state)
    return Network(policy.apply(model.to(device)).eval().requires_grad_(False), policy, device)


class SampleNoise:
    """Noise that depends on (seed, sample index) alone, so that a sample starts alike in any batch, on any device."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device):
        self.generators = [generator_for(seed, "sample", index) for index in indices]
        self.shape, self.device = shape, device

    def __call__(self, like: Tensor | None = None) -> Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # a copy from pageable memory would wait for the GPU
        return noise.to(self.device, non_blocking=True)


def draw(
    network: Network,
    config: RunConfig,
    labels: Tensor,
    *,
    seed: int = 0,
    unconditional: Network | None = None,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> Tensor:
    """Samples (N, C, H, W) float32 on the CPU for labels (N,), by the sampler of `config.sample`.

    `unconditional` switches to two-network guidance, of weight guidance_scale - 1. `on_batch` is told the number done.
    """
    options, model = config.sample, network.model
    check_labels(labels, network.num_classes)
    loop = build_loop(config, model.learn_sigma)
    main, *others = (
        LoopNetwork(n, options, loop.timesteps is not None) for n in (network, unconditional) if n is not None
    )
    guided = guide(main, config, loop, *others)
    nulls = [main.num_classes] if not others and options.guidance_scale != 1 else []
    by_step: Any = ByTimestep(guided, [n.go_to for n in (main, *others)])
    graph = StepGraph("sample.cuda_graph", network.device) if options.cuda_graph else None
    shape = (model.in_channels, *model.x_embedder.img_size)
    drawn = torch.empty(len(labels), *shape, dtype=torch.float32, device="cpu")
    for start in range(0, len(labels), options.batch_size):
        y = labels[start : start + options.batch_size]
        main.begin(loop.timesteps, torch.cat([y, y.new_tensor(nulls)]))
        for other in others:
            other.begin(loop.timesteps, y.new_tensor([_null_class(other)]))
        noise = SampleNoise(seed, range(start, start + len(y)), shape, network.device)
        drawn[start : start + len(y)] = loop.draw(by_step, y.to(network.device), noise, graph)
        on_batch(start + len(y))
    return drawn


def prepare(
    network: Network, config: RunConfig, unconditional: Network | None = None
) -> tuple[Loop, Callable[..., Tensor]]:
    """The loop and the guided network that `config.sample` asks for.

    Raises ValueError (ConfigError among them) for a number of steps or a guidance that cannot be.
    """
    loop = build_loop(config, network.model.learn_sigma)
    return loop, guide(network, config, loop, unconditional)


def guide(
    network: Network, config: RunConfig, loop: Loop, unconditional: Network | None = None
) -> Callable[..., Tensor]:
    """`network` with the guidance that `config.sample` asks for. ConfigError where it cannot be."""
    options, interval = config.sample, None
    if options.guidance_interval is not None:
        low, high = options.guidance_interval
        # The last evaluation of Heun is at t = 1 itself.
        interval = (low * loop.t_end, math.inf if loop.t_end == high == 1 else high * loop.t_end)
    if unconditional is not None:
        null = _null_class(unconditional)
        return TwoNetworkGuidance(network, unconditional, options.guidance_scale - 1, null, interval)
    if options.guidance_scale == 1:
        return network
    if network.model.y_embedder.dropout_prob == 0:
        raise ConfigError(
            f"sample.guidance_scale {options.guidance_scale} needs a null class, but this model was trained without "
            "label dropout; use sample.guidance_scale=1, or a second, unconditional network"
        )
    # The default of 3 is all of data with fewer.
    if (options.guidance_channels or 0) > max(network.model.in_channels, 3):
        raise ConfigError(
            f"sample.guidance_channels is {options.guidance_channels}, but there are {network.model.in_channels} "
            "channels; null guides all"
        )
    return ClassifierFreeGuidance(
        network, options.guidance_scale, network.num_classes, options.guidance_channels, interval
    )


def _null_class(network: Network) -> int:
    """The label by which a network is unconditional: its null class, or the only one it knows."""
    if network.model.y_embedder.dropout_prob > 0:
        return network.num_classes
    if network.num_classes == 1:
        return 0
    raise ConfigError(
        f"the unconditional network has {network.num_classes} classes and no null class; it must have been trained "
        "with label dropout, or on one class"
    )


def cycle_labels(count: int, classes: list[int] | None, num_classes: int) -> Tensor:
    """(count,) int64 labels going round the given classes, or round all."""
    chosen = torch.tensor(classes if classes else range(num_classes))
    return chosen[torch.arange(count) % len(chosen)]


def write(directory: Path, samples: Tensor, labels: Tensor, columns: int = 20) -> list[Path]:
    """Writes grid.png and samples.npz (`arr_0` uint8 N H W C, `labels`); latents as latents.npy and a preview grid.

    Samples of 1 or 3 channels are images in [-1, 1]. Others are latents, whose decoding is not ditfast's: the grid then
    shows their first three channels, scaled to their range.
    """
    directory.mkdir(parents=True, exist_ok=True)
    images = pictures(samples)
    if samples.shape[1] in (1, 3):
        data = directory / "samples.npz"
        save_npz(data, images, labels)
    else:
        data = directory / "latents.npy"
        np.save(data, samples.numpy())
        np.save(directory / "labels.npy", labels.numpy())
    save_grid(directory / "grid.png", images, columns, scale=_enlarged(samples))
    return [directory / "grid.png", data]


def pictures(samples: Tensor) -> Tensor:
    """What to show of samples (N, C, H, W): uint8 (N, H, W, 1 or 3), of latents their first channels in their range."""
    channels = samples.shape[1]
    if channels in (1, 3):
        return to_uint8(samples)
    shown = samples[:, : 3 if channels > 3 else 1]
    return to_uint8(shown / shown.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6))


def _enlarged(samples: Tensor) -> int:
    """How often to repeat a pixel, so that small images can be seen."""
    return max(1, 32 // samples.shape[-1])


def preview(model: DiffusionTransformer, config: RunConfig, device: torch.device, path: Path) -> None:
    """A small grid during training: up to 10 classes across, 4 rows, without touching the training's randomness."""
    classes = min(config.model.num_classes or 1, 10)
    labels = cycle_labels(4 * classes, list(range(classes)), classes)
    model.eval()
    try:
        with torch.no_grad():
            samples = draw(Network(model, config.precision, device), config, labels, seed=config.seed)
    finally:
        model.train()
    save_grid(path, pictures(samples), classes, scale=_enlarged(samples))
