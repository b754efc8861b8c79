"""From a run's sampling options to the loop that draws a batch, of any process and sampler."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ditfast.build import build_diffusion, build_transport
from ditfast.config import ConfigError, RunConfig, SampleConfig, nearest
from ditfast.diffusion import Sampler, SpacedDiffusion
from ditfast.diffusion.dpm_solver import DpmSolver
from ditfast.diffusion.samplers import StepRunner, at_timestep
from ditfast.diffusion.transport import FixedSteps, OdeSolver
from ditfast.diffusion.types import Model
from ditfast.logs import log


class Noise(Protocol):
    """Noise of a batch, a generator for each sample."""

    generators: list[torch.Generator]

    def __call__(self, like: Tensor | None = None) -> Tensor: ...


Draw = Callable[[Model, Tensor, Noise, StepRunner | None], Tensor]
"""draw(model, y (B,), noise, run_step or None) -> samples (B, C, ...) from the first of the noise."""


class Loop:
    """A sampler of a process, ready to draw batches.

    Attributes:
        timesteps: at which it evaluates the network, as models are told them; None where only a solver finds them.
        t_end: t that a guidance interval's 1 stands for.
    """

    def __init__(self, draw: Draw, timesteps: Sequence[float] | None, t_end: float):
        self.draw, self.timesteps, self.t_end = draw, timesteps, t_end


def build_loop(config: RunConfig, learn_sigma: bool) -> Loop:
    """The loop that `config.sample` asks for, for a network that learns its variance or not.

    ConfigError or ValueError for a number of steps or options that cannot be, ImportError for a missing package.
    """
    options, name = config.sample, config.sampler
    if config.process == "sit":
        if name.startswith("diffusers:"):
            return _of_flow(name.removeprefix("diffusers:"), config)
        return _of_transport(config)
    if name in ("ddpm", "ddim"):
        respacing = f"ddim{options.steps}" if name == "ddim" else str(options.steps)
        diffusion = build_diffusion(config.diffusion, learn_sigma, respacing)
        draw = partial(_by_steps, diffusion, options, name == "ddim")
        return Loop(draw, diffusion.timestep_map, diffusion.original_num_steps)
    diffusion = build_diffusion(config.diffusion, learn_sigma)
    if name == "dpm-solver++":
        solver = DpmSolver(diffusion, options.steps)
        return Loop(partial(_by_solver, solver, options.clip_denoised), solver.timesteps, diffusion.num_timesteps)
    scheduler = diffusers_scheduler(name.removeprefix("diffusers:"), diffusion, config)
    if learn_sigma:
        log.info("sample.sampler %s has a variance of its own: the one that the model learned is not used", name)
    timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))
    return Loop(partial(_by_scheduler, scheduler, options.steps), timesteps, diffusion.num_timesteps)


def _by_steps(
    diffusion: SpacedDiffusion,
    options: SampleConfig,
    ddim: bool,
    model: Model,
    y: Tensor,
    noise: Noise,
    run_step: StepRunner | None,
) -> Tensor:
    x = noise()
    noise_fn: Any = torch.zeros_like if ddim and options.eta == 0 else noise
    arguments: dict[str, Any] = {
        "clip_denoised": options.clip_denoised,
        "model_kwargs": {"y": y},
        "noise_fn": noise_fn,
    }
    if run_step is not None:
        arguments["run_step"] = partial(run_step, y=y, noise_fn=noise_fn)
    if ddim:
        return diffusion.ddim_sample_loop(model, x.shape, x, eta=options.eta, **arguments)
    return diffusion.p_sample_loop(model, x.shape, x, **arguments)


def _by_solver(
    solver: DpmSolver, clip_denoised: bool, model: Model, y: Tensor, noise: Noise, run_step: StepRunner | None
) -> Tensor:
    graph = {} if run_step is None else {"run_step": partial(run_step, y=y)}
    return solver.sample(model, noise(), {"y": y}, clip_denoised, **graph)


def _of_transport(config: RunConfig) -> Loop:
    make = _ode if config.sampler == "ode" else _sde
    try:
        loop = make(Sampler(build_transport(config.transport)), config.sample)
    except ValueError as error:
        raise ConfigError(
            f"sample.sampler {config.sampler} with sample.steps {config.sample.steps}: {error}"
        ) from error
    return Loop(partial(_along_path, loop), loop.timesteps, 1.0)


# The library counts points, of which there is one more than steps.


def _ode(sampler: Sampler, options: SampleConfig) -> FixedSteps | OdeSolver:
    method = {"heun": "heun2"}.get(options.method, options.method)
    shift = options.timestep_shift
    return sampler.sample_ode(sampling_method=method, num_steps=options.steps + 1, timestep_shift=shift)


def _sde(sampler: Sampler, options: SampleConfig) -> FixedSteps | OdeSolver:
    last_step = None if options.last_step == "none" else options.last_step
    if last_step is not None and options.steps < 2:
        raise ValueError(f"it takes at least 2 steps with a last_step, here {last_step}, which is one of them")
    return sampler.sample_sde(
        sampling_method=options.method.title(),
        diffusion_form=options.diffusion_form,
        diffusion_norm=options.diffusion_norm,
        last_step=last_step,
        last_step_size=options.last_step_size,
        num_steps=options.steps + (last_step is None),
        timestep_shift=options.timestep_shift,
    )


def _along_path(
    loop: FixedSteps | OdeSolver, model: Model, y: Tensor, noise: Noise, run_step: StepRunner | None
) -> Tensor:
    if isinstance(loop, OdeSolver) or run_step is None:
        return loop.sample(model, noise(), {"y": y}, noise)
    return loop.sample(model, noise(), {"y": y}, noise, partial(run_step, y=y))


def diffusers_scheduler(name: str, diffusion: SpacedDiffusion, config: RunConfig) -> Any:
    """diffusers' scheduler of that class over the process's betas.

    ConfigError where it is missing, of another kind, or cannot step from what the network predicts.
    What it does not take from the process has its own defaults, the spacing of its timesteps for instance.
    """
    cls = _scheduler_class(name)
    if config.sample.timestep_shift != 1:
        raise ConfigError(f"sample.timestep_shift is for process sit; leave it at 1 with diffusers' {name}")
    accepted = inspect.signature(cls.__init__).parameters
    if not {"trained_betas", "prediction_type"} <= set(accepted):
        raise ConfigError(f"sample.sampler: diffusers' {name} is not for noise by betas, as process ddpm has it")
    if "Inverse" in name:
        raise ConfigError(f"sample.sampler: diffusers' {name} leads from data to noise; take one that draws samples")
    arguments = {
        "num_train_timesteps": diffusion.num_timesteps,
        "trained_betas": diffusion.betas.tolist(),
        "prediction_type": "sample" if config.diffusion.predict_xstart else "epsilon",
    }
    if "clip_sample" in accepted:
        arguments["clip_sample"] = config.sample.clip_denoised
    elif config.sample.clip_denoised:
        raise ConfigError(f"sample.clip_denoised: diffusers' {name} does not clip; set it to false")
    scheduler = cls(**arguments)
    scheduler.set_timesteps(config.sample.steps)
    t, x = scheduler.timesteps[0], torch.zeros(1, 1, 1, 1)
    try:
        scheduler.step(scheduler.scale_model_input(x, t), t, x, **_noise_of(scheduler, [torch.Generator()]))
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = "x_0" if config.diffusion.predict_xstart else "epsilon"
        raise ConfigError(f"sample.sampler: diffusers' {name} cannot step from a predicted {kind}: {error}") from error
    return scheduler


def _scheduler_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"sample.sampler diffusers:{name} needs diffusers: pip install 'diffusers>=0.31'") from error
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise ConfigError(f"sample.sampler: diffusers has no scheduler {name!r}{nearest(name, known)}")
    return getattr(diffusers, name)


def _of_flow(name: str, config: RunConfig) -> Loop:
    """The loop of a scheduler of diffusers for flow matching: noise at sigma x + (1 - sigma) data, SiT's Linear path.

    Its sigma is 1 - t and its prediction noise - data, the negative of SiT's velocity.
    """
    cls, options, transport = _scheduler_class(name), config.sample, config.transport
    if not name.startswith("FlowMatch"):
        raise ConfigError(
            f"sample.sampler: diffusers' {name} is not for flows, as process sit has them; take a FlowMatch... one"
        )
    if (transport.path, transport.prediction) != ("Linear", "velocity"):
        found = f"of path {transport.path} predicts {transport.prediction}"
        raise ConfigError(
            f"sample.sampler: diffusers' {name} steps by the velocity of a Linear path, this transport {found}"
        )
    if options.clip_denoised:
        raise ConfigError(f"sample.clip_denoised: diffusers' {name} does not clip; set it to false")
    # t -> s t / (1 + (s - 1) t) for t is the same with 1 / s for sigma.
    scheduler = cls(shift=1 / options.timestep_shift)
    scheduler.set_timesteps(options.steps)
    times = list(dict.fromkeys(_flow_time(scheduler, t) for t in scheduler.timesteps))
    return Loop(partial(_by_flow, scheduler, options.steps), times, 1.0)


def _flow_time(scheduler: Any, timestep: Tensor) -> float:
    return 1 - timestep.item() / scheduler.config.num_train_timesteps


def _by_flow(scheduler: Any, steps: int, model: Model, y: Tensor, noise: Noise, run_step: StepRunner | None) -> Tensor:
    """diffusers' own loop; it keeps state, so each batch begins anew."""
    x = noise()
    scheduler.set_timesteps(steps, device=x.device)
    options = _noise_of(scheduler, noise.generators)
    for timestep in scheduler.timesteps:
        t = _flow_time(scheduler, timestep)
        with torch.no_grad():
            velocity = at_timestep(model, t)(x, torch.full((len(x),), t, device=x.device), y=y)
        x = scheduler.step(-velocity, timestep, x, **options).prev_sample
    return x


def _noise_of(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """The argument by which each sample's noise is its generator's, if the scheduler draws any."""
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generators} if takes_noise else {}


def _by_scheduler(
    scheduler: Any, steps: int, model: Model, y: Tensor, noise: Noise, run_step: StepRunner | None
) -> Tensor:
    """diffusers' own loop; it keeps state, so each batch begins anew."""
    x = noise()
    scheduler.set_timesteps(steps, device=x.device)
    options = _noise_of(scheduler, noise.generators)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            out = at_timestep(model, t.item())(given, t.expand(len(x)), y=y)[:, : x.shape[1]]
        x = scheduler.step(out, t, x, **options).prev_sample
    return x
