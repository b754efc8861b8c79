"""The typed configuration of a run: every option, its default, the presets, and the precision policies."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from ditfast.files import replacing
from ditfast.layers import Architecture
from ditfast.layers.recompute import RECOMPUTE_POLICIES, policy_of_block
from ditfast.messages import describe, explain, nearest
from ditfast.precision import PRECISIONS, Precision
from ditfast.presets import PRESETS


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the option, what was given and what is expected."""


def checked_precision(name: str) -> str:
    """`name` if it is one of PRECISIONS, else ConfigError."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}{nearest(name, PRECISIONS)}")
    return name


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """The transformer: its architecture, and what the data decides.

    `input_size`, `in_channels` and `num_classes` left at None are taken from the data.
    """

    class_dropout_prob: float = 0.1  # how often a label is replaced by the null class in training
    learn_sigma: bool = True  # as many channels again, for the variance
    input_size: tuple[int, int] | None = None  # (height, width) of what the model sees
    in_channels: int | None = None  # of what the model sees
    num_classes: int | None = None  # without the null class

    @property
    def architecture(self) -> Architecture:
        return Architecture(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)})


@dataclass
class DiffusionConfig:
    """Process ddpm; the arguments of `ditfast.diffusion.create_diffusion`."""

    noise_schedule: str = "linear"  # linear, squaredcos_cap_v2 (the cosine's), ...
    diffusion_steps: int = 1000  # T of the chain in training
    predict_xstart: bool = False  # the model predicts x_0 in place of the noise
    use_kl: bool = False  # trains on the variational bound in place of the MSE
    sigma_small: bool = False  # without learn_sigma: the posterior's variance in place of beta
    rescale_learned_sigmas: bool = False  # weights the bound's term beside the MSE by T / 1000
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"  # the second draws by the loss


@dataclass
class TransportConfig:
    """Process sit; the arguments of `ditfast.diffusion.create_transport`."""

    path: Literal["Linear", "GVP", "VP"] = "Linear"  # from noise to data
    prediction: Literal["velocity", "noise", "score"] = "velocity"  # what the model predicts
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"  # of a noise or score
    train_eps: float | None = None  # how far training stays away from both ends of the path; null for the path's own
    sample_eps: float | None = None  # how far sampling does
    timestep_sampler: Literal["uniform", "lognormal"] = "uniform"  # of the training times; lognormal: sigmoid(N(0, 1))
    cosine_loss: bool = False  # adds the loss of the velocity's direction
    timestep_shift: float = 1.0  # of the training times; below 1 towards the noise


@dataclass
class DataConfig:
    """What to train on."""

    kind: str = "digits"  # digits (in scikit-learn), folder (of images), cifar10 (binary files), features (.npy)
    path: str | None = None  # where it is; the digits need none
    image_size: int | None = None  # side in pixels that a folder's images are resized and cropped to
    flip: bool = False  # random horizontal flips
    workers: int = 0  # loader processes


@dataclass
class OptimConfig:
    """AdamW and what goes with it; the defaults are DiT's published recipe."""

    lr: float = 1e-4  # learning rate, after the warm-up
    beta1: float = 0.9  # decay of the gradients' average
    beta2: float = 0.999  # decay of their squares' average
    eps: float = 1e-8  # added to the root of the squares' average
    weight_decay: float = 0.0  # decoupled from the gradients, times lr
    decay: Literal["matrices", "all"] = "matrices"  # matrices: no decay of biases, norms and embedding tables
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to zero at the last step
    warmup_steps: int = 0  # in which lr rises linearly from zero
    clip_norm: float = 0.0  # global gradient norm; 0 does not clip
    ema_rates: list[float] = field(default_factory=lambda: [0.9999])  # an EMA of the weights each
    ema_warmup: bool = False  # rate min(rate, (1 + step) / (10 + step)), for short runs


@dataclass
class SampleConfig:
    """How samples are drawn, by `ditfast sample` and for the grids during training.

    diffusion_form: how the noise that an SDE adds depends on t.
    """

    sampler: str | None = None  # ddpm, ddim, dpm-solver++, of sit ode, sde; diffusers:CLASS; null: the first
    steps: int = 250  # of the sampler
    guidance_scale: float = 4.0  # 1 is no guidance
    guidance_channels: int | None = 3  # the official form guides 3 channels; null guides all
    guidance_interval: tuple[float, float] | None = None  # of t / T, or sit's t: guides only inside [low, high)
    eta: float = 0.0  # DDIM's noise level
    clip_denoised: bool = False  # clips the predicted x_0 to [-1, 1], as of images
    method: Literal["euler", "heun", "dopri5"] = "euler"  # of ode and sde; dopri5, of ode, chooses its steps itself
    timestep_shift: float = 1.0  # of sit: below 1, steps are denser near the noise
    diffusion_form: Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"] = "sigma"
    diffusion_norm: float = 1.0  # with the form: how much noise an SDE adds
    last_step: Literal["none", "Mean", "Tweedie", "Euler"] = "Mean"  # of an SDE, without noise
    last_step_size: float = 0.04  # in t, which that step goes to 1
    batch_size: int = 64  # samples drawn at once
    ema: float | None = None  # which EMA rate's weights; null takes the first, 0 the raw weights
    cuda_graph: bool = False  # replays the sampler's steps on a GPU without Python
    modulation_ahead: bool = True  # computes the adaptive norms' modulation of all steps before the loop


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 400_000  # optimizer steps of the whole run
    batch_size: int = 256  # of a step, over all processes and parts
    accumulate: int = 1  # parts of a batch that are computed one after the other
    precision: str = "bf16"  # fp32, tf32, bf16, fp16, or with low-precision weights bf16-fast, fp16-fast
    recompute: str = "ops"  # none, ops, mlp, block, or block:k for every k-th block: ditfast.layers.recompute
    compile: bool = False  # the whole model under torch.compile
    cuda_graph: bool = False  # replays the whole step on a GPU without Python, on one process
    log_every: int = 100  # steps between lines of the log
    sample_every: int = 0  # 0 draws no grids during training
    save_every: int = 50_000  # steps between checkpoints
    keep: int = 3  # checkpoints kept on disk
    init_from: str | None = None  # an official checkpoint (.pt, .safetensors) to start from
    tensorboard: bool = True  # writes the log for TensorBoard too


POSITIVE, BELOW_HALF, BELOW_ONE, ANY = 5e-324, 0.5 - 1e-12, 1 - 1e-12, float("inf")
LIMITS: dict[str, tuple[float, float]] = {  # the smallest and the largest value of what is not free
    "seed": (0, 2**63 - 1), "data.workers": (0, ANY), "data.image_size": (1, ANY),
    "optim.lr": (POSITIVE, ANY), "optim.beta1": (0, BELOW_ONE), "optim.beta2": (0, BELOW_ONE), "optim.eps": (0, ANY),
    "optim.weight_decay": (0, ANY), "optim.warmup_steps": (0, ANY), "optim.clip_norm": (0, ANY),
    "optim.ema_rates": (POSITIVE, BELOW_ONE),
    "train.steps": (1, ANY), "train.batch_size": (1, ANY), "train.accumulate": (1, ANY), "train.log_every": (1, ANY),
    "train.sample_every": (0, ANY), "train.save_every": (1, ANY), "train.keep": (1, ANY),
    "sample.steps": (1, ANY), "sample.batch_size": (1, ANY), "sample.guidance_scale": (0, ANY), "sample.eta": (0, 1),
    "sample.guidance_channels": (1, ANY), "sample.guidance_interval": (0, 1),
    "sample.timestep_shift": (POSITIVE, ANY), "transport.timestep_shift": (POSITIVE, ANY),
    "sample.diffusion_norm": (0, ANY), "sample.last_step_size": (0, BELOW_ONE),
    "transport.train_eps": (0, BELOW_HALF), "transport.sample_eps": (0, BELOW_HALF),
}  # fmt: skip


# The processes that a sampler is of, and the samplers that an option of SampleConfig is for.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "ddpm": ("ddpm",), "ddim": ("ddpm",), "ode": ("sit",), "sde": ("sit",), "dpm-solver++": ("ddpm",),
    "diffusers": ("ddpm", "sit"),
}  # fmt: skip
SAMPLER_OPTIONS = {
    "eta": ("ddim",), "clip_denoised": ("ddpm", "ddim", "dpm-solver++", "diffusers"),
    "method": ("ode", "sde"), "timestep_shift": ("ode", "sde", "diffusers"),
    **dict.fromkeys(("diffusion_form", "diffusion_norm", "last_step", "last_step_size"), ("sde",)),
}  # fmt: skip


@dataclass
class RunConfig:
    """Everything that defines a run; saved with it as config.yaml."""

    out: str = "runs/default"  # the run's directory
    process: Literal["ddpm", "sit"] = "ddpm"  # noise by `diffusion`, or SiT's by `transport`
    seed: int = 0  # of weights, data order, noise and label drops
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    deterministic: bool = False  # PyTorch's deterministic algorithms alone
    tuned: str | None = None  # a file of `python -m ditfast.kernels tune`; null keeps the kernels' pinned configs
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        checked_precision(self.train.precision)
        try:
            policy_of_block(self.train.recompute, 0)
        except ValueError as error:
            raise ConfigError(f"train.{error}{nearest(str(self.train.recompute), RECOMPUTE_POLICIES)}") from error
        if not self.out:
            raise ConfigError("out is empty; name the run's directory, for instance --out runs/mine")
        self._check_numbers()
        self._check_process()
        self._check_sampler()

    def _check_numbers(self) -> None:
        for key, (low, high) in LIMITS.items():
            section, _, name = key.rpartition(".")
            value = getattr(getattr(self, section) if section else self, name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if number is not None and not low <= number <= high:
                    bounds = f"at least {low:g}" if high == ANY else f"in {low:g} .. {high:g}"
                    if low == POSITIVE:
                        bounds = "positive" if high == ANY else f"positive and below {high:g}"
                    raise ConfigError(f"{key} must be {bounds}, got {value}")
        interval = self.sample.guidance_interval
        if interval is not None and not interval[0] < interval[1]:
            raise ConfigError(f"sample.guidance_interval must be [low, high] with low < high, got {list(interval)}")
        if self.optim.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optim.warmup_steps {self.optim.warmup_steps} exceeds train.steps {self.train.steps}: "
                "the run would end in its warm-up"
            )

    def _check_process(self) -> None:
        owner, key = ("sit", "transport") if self.process == "ddpm" else ("ddpm", "diffusion")
        for name, value in _changed(getattr(self, key)):
            found = f"{key}.{name} is {value!r}, an option of process {owner}, but process is {self.process}"
            raise ConfigError(f"{found}; leave it out, or set process={owner}")
        if self.transport.cosine_loss and self.transport.prediction != "velocity":
            found = f"with transport.prediction {self.transport.prediction}"
            raise ConfigError(f"transport.cosine_loss compares velocities: leave it out {found}")
        if self.model.learn_sigma and self.model.returns_sigma != (self.process == "ddpm"):
            reads = "reads no variance" if self.process == "sit" else "reads the variance that the model learns"
            wanted = f"model.returns_sigma={str(self.process == 'ddpm').lower()}"
            raise ConfigError(f"process {self.process} {reads}: set {wanted}, or model.learn_sigma=false")

    def _check_sampler(self) -> None:
        name, options = self.sampler, self.sample
        kind = "diffusers" if name.startswith("diffusers:") else name
        if kind not in SAMPLERS or name == "diffusers":
            raise ConfigError(
                f"sample.sampler must be one of {', '.join(SAMPLERS)}:CLASS, got {name!r}{nearest(name, SAMPLERS)}"
            )
        if self.process not in SAMPLERS[kind]:
            own = ", ".join(known for known, processes in SAMPLERS.items() if self.process in processes)
            (owner,) = SAMPLERS[kind]
            raise ConfigError(
                f"sample.sampler {name} is of process {owner}, but process is {self.process}, which has {own}"
                f"; take one of these, or --process {owner}"
            )
        for option, value in _changed(options):
            if kind not in (owners := SAMPLER_OPTIONS.get(option, (kind,))):
                found = f"sample.{option} is {value!r}, an option of {' and '.join(owners)}, but the sampler is {name}"
                raise ConfigError(f"{found}; leave it at {getattr(SampleConfig, option)!r}")
        if kind == "diffusers" and options.cuda_graph:
            raise ConfigError("sample.cuda_graph cannot hold the steps of diffusers, which run in Python; leave it off")
        if options.method == "dopri5" and kind == "sde":
            raise ConfigError("sample.method dopri5 solves the ode, but sample.sampler is sde: take euler or heun")
        if options.method == "dopri5" and (options.cuda_graph or options.timestep_shift != 1):
            option, off = ("cuda_graph", "false") if options.cuda_graph else ("timestep_shift", "1")
            remedy = f"take sample.method euler or heun, or {option} {off} (`ditfast sample --{option} {off}`)"
            raise ConfigError(f"sample.{option} needs steps that are known ahead: {remedy}")

    @property
    def sampler(self) -> str:
        """The sampler by name; by default the process's first."""
        return self.sample.sampler or next(name for name, processes in SAMPLERS.items() if self.process in processes)

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.train.precision]


def _changed(section: Any) -> list[tuple[str, Any]]:
    """(name, value) of the options that are not at their defaults."""
    values = ((f.name, getattr(section, f.name), f.default) for f in dataclasses.fields(section))
    return [(name, value) for name, value, default in values if value != default]


def preset(name: str) -> dict[str, Any]:
    """The overrides of a preset, by dotted key; ConfigError names the nearest one for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}{nearest(name, PRESETS) or '; known: ' + ', '.join(PRESETS)}")
    return PRESETS[name]()


def keys(cls: Any = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass."""
    found: list[str] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            found += keys(f.type, f"{prefix}{f.name}.")
        else:
            found.append(prefix + f.name)
    return found


def parse_config(arguments: list[str], default: str | None = None, **kwargs: Any) -> RunConfig:
    """The configuration of a command line: `--optim.lr 1`, over `--config FILE`s, over a preset, `--print_config`.

    The preset is that of `--preset`, or of a file's `preset:`, or the default. Raises ConfigError; for an unknown key
    it names the nearest known one. `kwargs` go to the parser.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset")
    peek.add_argument("--config", action="append", default=[])
    try:
        given, _ = peek.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; presets: {', '.join(PRESETS)}") from error
    named = [tree["preset"] for tree in map(_read_yaml, given.config) if tree.get("preset")]
    base = given.preset or (named[-1] if named else default)
    made = _run_parser(base, **kwargs)
    if {"-h", "--help"} & set(arguments):
        describe(made, RunConfig)
    return _instantiate(made, lambda: made.parse_args(arguments), RunConfig)


def config_from(tree: dict[str, Any]) -> RunConfig:
    """The configuration that a checkpoint holds as JSON, over the defaults. ConfigError for options unknown here."""
    made = _run_parser(None)
    return _instantiate(made, lambda: made.parse_object(tree), RunConfig)


def _run_parser(base: str | None, **kwargs: Any) -> jsonargparse.ArgumentParser:
    made = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, **kwargs)
    made.add_argument("--preset", help=f"sets the defaults: {', '.join(PRESETS)}")
    made.add_argument("--config", action="config", help="a YAML file of options; those after it on the line win")
    made.add_class_arguments(RunConfig, as_group=False)
    if base is not None:
        made.set_defaults(preset(base))
    return made


def _read_yaml(path: str) -> dict[str, Any]:
    """The options in a file; ConfigError names the file where it cannot be read as such."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration file {path} holds {type(tree).__name__}, expected options (`key: value`)")
    return tree


def parse_sample(arguments: list[str], default: SampleConfig) -> SampleConfig:
    """The sampler's options of a command line (`--steps 50`), over those in `default`. Raises ConfigError."""
    made = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, prog="ditfast sample")
    made.add_class_arguments(SampleConfig, as_group=False)
    made.set_defaults(dataclasses.asdict(default))
    return _instantiate(made, lambda: made.parse_args(arguments), SampleConfig)


def _instantiate(made: jsonargparse.ArgumentParser, parse: Callable[[], Any], cls: Any) -> Any:
    try:
        parsed = made.instantiate(parse())
    except argparse.ArgumentError as error:
        raise ConfigError(explain(str(error), keys(cls))) from error
    except ConfigError:
        raise
    except ValueError as error:  # of the architecture
        raise ConfigError(f"model.{error}") from error
    return cls(**{f.name: parsed[f.name] for f in dataclasses.fields(cls)})


def differences(theirs: RunConfig, ours: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(theirs, ours) of every option that differs, by dotted key."""
    pairs = {key: (attrgetter(key)(theirs), attrgetter(key)(ours)) for key in keys()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def load_config(path: str | Path) -> RunConfig:
    """The configuration in a YAML file, as `save_config` writes it."""
    return parse_config(["--config", str(path)])


def save_config(config: RunConfig, path: Path) -> None:
    """Writes every option as YAML, which `--config` reads back."""
    with replacing(path) as file:
        file.write(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False).encode())
