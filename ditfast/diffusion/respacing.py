"""Shorter chains: which steps of the original diffusion are kept, and the process that runs on them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gaussian import GaussianDiffusion
from .schedules import get_named_beta_schedule
from .types import LossType, ModelMeanType, ModelVarType


def _ddim_steps(num_timesteps: int, count: int) -> set[int]:
    strides = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps - 1, 0, -1)}
    if count in strides:
        return set(range(0, num_timesteps, strides[count]))
    divisors = [n for n in range(2, num_timesteps + 1) if num_timesteps % n == 0]
    nearest = sorted(sorted(strides, key=lambda n: abs(n - count))[:2])
    raise ValueError(
        f"ddim{count}: no integer stride visits exactly {count} of {num_timesteps} steps; the nearest counts that "
        f"work are {', '.join(map(str, nearest))}; counts that divide {num_timesteps}: {', '.join(map(str, divisors))}"
    )


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"timestep respacing {text!r} is neither a count ('250'), a list of counts ('10,15,20') nor 'ddimN'"
        ) from None


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """The original timesteps that a shorter chain keeps.

    Args:
        num_timesteps: length T of the original chain.
        section_counts: how many steps to keep in each of equally long sections of the chain, evenly spread with both
            ends kept, as a list, as "10,15,20" or, of the one section that is the whole chain, as a number; or "ddimN"
            for N steps of the one integer stride that gives N.

    Raises:
        ValueError: a section shorter than its count; a "ddimN" without a stride; text of another form.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim") and section_counts[4:].isdecimal():
            return _ddim_steps(num_timesteps, int(section_counts[4:]))
        section_counts = _parse_counts(section_counts)
    elif isinstance(section_counts, int):
        section_counts = [section_counts]
    if not section_counts or min(section_counts) < 1:
        raise ValueError(f"each section keeps at least 1 step, got counts {list(section_counts)}")
    size, longer = divmod(num_timesteps, len(section_counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(section_counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"cannot keep {count} of the {length} steps in section {section} of {num_timesteps} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: published checkpoints are sampled with the roundings of the running sum.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return kept


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion that runs on some steps of an original one.

    Its betas are those for which the kept alpha-bars stay as they were (Nichol and Dhariwal 2021, section 4). The
    process counts t = 0 .. len(use_timesteps) - 1; models and cond_fn receive the original timesteps.

    Args:
        use_timesteps: original timesteps to keep.
        betas: the original chain's (T,) betas.
        kwargs: the other arguments of `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: Tensor | Sequence[float], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(betas)
        kept = sorted(self.use_timesteps)
        if not kept or kept[0] < 0 or kept[-1] >= self.original_num_steps:
            raise ValueError(
                f"use_timesteps must be a non-empty part of 0 .. {self.original_num_steps - 1}, got {kept}"
            )
        alpha_bar = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)[kept]
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        super().__init__(betas=1 - alpha_bar / before, timestep_map=kept, **kwargs)


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> SpacedDiffusion:
    """The diffusion of the official DiT and its relatives.

    Args:
        timestep_respacing: None or "" for all steps, else as in `space_timesteps` ("250", 250, "10,15,20", "ddim50").
        noise_schedule: a name in `SCHEDULES`.
        use_kl: train on the variational bound (RESCALED_KL) in place of the MSE.
        sigma_small: with learn_sigma=False, the posterior variance in place of beta.
        predict_xstart: the model predicts x_0 in place of the noise.
        learn_sigma: the model has 2C output channels and learns its variance (LEARNED_RANGE).
        rescale_learned_sigmas: with learn_sigma and the MSE, weight the bound's term by T / 1000.
        diffusion_steps: T of the original chain.
    """
    mse = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if timestep_respacing is None or timestep_respacing == "":
        timestep_respacing = diffusion_steps
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        betas=get_named_beta_schedule(noise_schedule, diffusion_steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else mse,
    )
