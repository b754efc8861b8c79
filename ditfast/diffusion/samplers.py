"""DDPM and DDIM samplers, as free functions over a process and any network.

`GaussianDiffusion` carries them as methods. A model that has `at_timestep(t)` is asked by the loops, once a step, for
the callable to run at original timestep t: it can then decide on the host what a GPU tensor could not tell without
a wait (see `guidance.py`). `run_step` stands between a loop and its steps: it may hold them in a CUDA graph.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor

from ditfast.kernels import guided_step

from .step_table import Sampler, step_table
from .types import ConditionFn, Model, ModelMeanType, TensorFn, Unmixed

if TYPE_CHECKING:
    from .gaussian import GaussianDiffusion


class Step(TypedDict):
    """What a sampler's step returns: the next x and the predicted x_0, both (B, C, ...)."""

    sample: Tensor
    pred_xstart: Tensor


StepRunner = Callable[..., Step]
"""`run_step(step, model, x, t, *more, **options)` does what `step(model, x, t, *more, **options)` does.

t (B,) and more are tensors; it may override other options by name.
"""


def run_step_directly(
    step: Callable[..., Step], model: Model, x: Tensor, t: Tensor, *more: Tensor, **options: Any
) -> Step:
    """The `StepRunner` that adds nothing."""
    return step(model, x, t, *more, **options)


class StepOptions(TypedDict, total=False):
    """Options that every step takes.

    `denoised_fn` is applied to the predicted x_0; `cond_fn` is the gradient of log p(y | x_t); `model_kwargs` go to the
    model and to cond_fn.
    """

    denoised_fn: TensorFn | None
    cond_fn: ConditionFn | None
    model_kwargs: Mapping[str, Any] | None


class SamplerOptions(StepOptions, total=False):
    """Options of a sampler's step that its loops hand on.

    `noise_fn` draws noise shaped like its argument, once a step, the last step included (default torch.randn_like; to
    seed each sample, pass one that uses generators).
    """

    noise_fn: TensorFn


def p_sample(
    process: "GaussianDiffusion",
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    **options: Unpack[SamplerOptions],
) -> Step:
    """One ancestral step x_t (B, C, ...) -> x_{t-1}; no noise is added at t = 0 (Ho et al. 2020, algorithm 2).

    clip_denoised clamps the predicted x_0 to [-1, 1], in every sampler; for the others see `SamplerOptions`.
    """
    return _step(process, "ddpm", 1.0, model, x, t, clip_denoised, **options)


def ddim_sample(
    process: "GaussianDiffusion",
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    *,
    eta: float = 0.0,
    **options: Unpack[SamplerOptions],
) -> Step:
    """One DDIM step x_t (B, C, ...) -> x_{t-1} (Song et al. 2020, equation 12).

    Args:
        eta: 0 is deterministic, 1 has the posterior's variance (equation 16).
        options: see `SamplerOptions`; noise is drawn at eta = 0 and at t = 0 too, as officially, and not added.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (deterministic) and 1 (the posterior's variance), got {eta}")
    return _step(process, "ddim", eta, model, x, t, clip_denoised, **options)


def ddim_reverse_sample(
    process: "GaussianDiffusion",
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    *,
    eta: float = 0.0,
    **options: Unpack[StepOptions],
) -> Step:
    """One step x_t (B, C, ...) -> x_{t+1} of the DDIM's differential equation run backwards, from data to noise.

    Song et al. 2020, section 4.3. At t = T - 1 it reaches pure noise. `eta` must be 0: only that path is deterministic.
    """
    if eta != 0:
        raise ValueError(f"the reverse exists for the deterministic path only: eta must be 0, got {eta}")
    return _step(process, "ddim_reverse", eta, model, x, t, clip_denoised, noise_fn=None, **options)


def p_sample_loop_progressive(
    process: "GaussianDiffusion",
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    run_step: StepRunner = run_step_directly,
    **options: Unpack[SamplerOptions],
) -> Iterator[Step]:
    """The steps of `p_sample_loop`, one by one, from t = T - 1 to 0."""
    step = partial(p_sample, process, clip_denoised=clip_denoised, **options)
    return _loop(process, step, model, shape, noise, device, progress, run_step)


def ddim_sample_loop_progressive(
    process: "GaussianDiffusion",
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    run_step: StepRunner = run_step_directly,
    eta: float = 0.0,
    **options: Unpack[SamplerOptions],
) -> Iterator[Step]:
    """The steps of `ddim_sample_loop`, one by one, from t = T - 1 to 0."""
    step = partial(ddim_sample, process, clip_denoised=clip_denoised, eta=eta, **options)
    return _loop(process, step, model, shape, noise, device, progress, run_step)


def p_sample_loop(
    process: "GaussianDiffusion",
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    run_step: StepRunner = run_step_directly,
    **options: Unpack[SamplerOptions],
) -> Tensor:
    """Samples (B, C, ...) by the ancestral chain.

    Args:
        model: any `model(x (B, C, ...), original t (B,), **model_kwargs)`.
        shape: (B, C, ...).
        noise: the x_T to start from, of that shape; drawn from torch's global generator if None.
        clip_denoised: clamp the predicted x_0 to [-1, 1], after `denoised_fn`.
        device: where to draw it; by default the model's, for a bare function torch's default device.
        progress: show a bar.
        run_step: how to run a step; see `StepRunner`.
        options: see `SamplerOptions`.
    """
    args = (process, model, shape, noise, clip_denoised)
    loop = p_sample_loop_progressive(*args, device=device, progress=progress, run_step=run_step, **options)
    return _last(loop)


def ddim_sample_loop(
    process: "GaussianDiffusion",
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    run_step: StepRunner = run_step_directly,
    eta: float = 0.0,
    **options: Unpack[SamplerOptions],
) -> Tensor:
    """Samples (B, C, ...) by DDIM; arguments as in `p_sample_loop`, `eta` as in `ddim_sample`."""
    args = (process, model, shape, noise, clip_denoised)
    loop = ddim_sample_loop_progressive(*args, device=device, progress=progress, run_step=run_step, eta=eta, **options)
    return _last(loop)


def _loop(
    process: "GaussianDiffusion",
    step: Callable[..., Step],
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    progress: bool,
    run_step: StepRunner,
) -> Iterator[Step]:
    if noise is None:
        noise = torch.randn(*shape, device=_device_of(model) if device is None else device)
    if noise.shape != tuple(shape):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, but {tuple(shape)} was asked for")
    x = noise
    for i in _track(range(process.num_timesteps - 1, -1, -1), progress):
        network = at_timestep(model, process.timestep_map[i])
        with torch.no_grad():
            out = run_step(step, network, x, torch.full((len(x),), i, device=x.device))
        yield out
        x = out["sample"]


def at_timestep(model: Model, t: float) -> Model:
    """What to call in a model's place for a batch that is all at original timestep t, or at time t of a transport.

    By its class's `at_timestep`: one that a wrapper finds by __getattr__ is of what it wraps, and would bypass it.
    """
    choose = getattr(type(model), "at_timestep", None)
    return model if choose is None else choose(model, t)


def _last(steps: Iterator[Step]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample


def _step(
    process: "GaussianDiffusion",
    sampler: Sampler,
    eta: float,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool,
    denoised_fn: TensorFn | None = None,
    cond_fn: ConditionFn | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    noise_fn: TensorFn | None = torch.randn_like,
) -> Step:
    """Where no function of the caller's stands between prediction and update, mixing, clamp and update are one op."""
    mean_type = process.model_mean_type
    if denoised_fn is None and cond_fn is None:
        unmixed, _ = process.call_unmixed(model, x, t, model_kwargs)
    else:
        out = process.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if sampler == "ddpm":
            mean = out["mean"] if cond_fn is None else process.condition_mean(cond_fn, out, x, t, model_kwargs)
            assert noise_fn is not None
            std = torch.exp(0.5 * out["log_variance"]) * (t > 0).view(-1, *(1,) * (x.ndim - 1))
            return {"sample": mean + std * noise_fn(x), "pred_xstart": out["pred_xstart"]}
        if cond_fn is not None:
            out = process.condition_score(cond_fn, out, x, t, model_kwargs)
        unmixed, mean_type, clip_denoised = Unmixed(out["pred_xstart"]), ModelMeanType.START_X, False
    noise = None if noise_fn is None else noise_fn(x)
    name = f"{sampler}, eta {eta}, {mean_type}"
    coefficients = process.gather_rows(name, t, x, lambda: step_table(process, sampler, eta, mean_type))
    learned = coefficients.shape[1] == 7
    cond = unmixed.cond if learned else unmixed.cond[:, : x.shape[1]]
    added = noise if eta > 0 else None
    x_next, x_start = guided_step(x, cond, unmixed.uncond, added, coefficients, unmixed.scale, clip_denoised)
    assert x_start is not None
    return {"sample": x_next, "pred_xstart": x_start}


def _device_of(model: object) -> torch.device | None:
    """The device of a module, of the one whose method this is, or of the network inside a guidance; else None."""
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        return None if parameter is None else parameter.device
    inner = (getattr(model, name, None) for name in ("__self__", "model", "cond_model"))
    return next((_device_of(network) for network in inner if network is not None), None)


def _track(steps: Sequence[int], progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, "sampling")
