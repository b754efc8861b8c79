"""Betas of every named schedule."""

import pytest
import torch

from ditfast.diffusion import (
    SCHEDULES,
    betas_for_alpha_bar,
    create_diffusion,
    get_beta_schedule,
    get_named_beta_schedule,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_named_schedules_are_float64_betas(name):
    betas = get_named_beta_schedule(name, 200)
    assert betas.dtype == torch.float64 and betas.shape == (200,)
    assert bool(((betas > 0) & (betas < 1)).all()) and bool((betas.diff() >= 0).all())


def test_linear_alpha_bar_golden():
    bar = (1 - get_named_beta_schedule("linear", 1000)).cumprod(0)
    expected = [0.9999, 0.9997800920720721, 0.5214230306185275, 0.07779665836502389, 4.035829765375676e-05]
    assert bar[[0, 1, 250, 500, 999]].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("quad", [(0.1**0.5 * (4 - i) / 4 + 0.5**0.5 * i / 4) ** 2 for i in range(5)]),
        ("const", [0.5] * 5),
        ("jsd", [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]),
        ("warmup10", [0.5] * 5),
        ("warmup50", [0.1, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_legacy_schedules(name, expected):
    betas = get_beta_schedule(name, beta_start=0.1, beta_end=0.5, num_diffusion_timesteps=5)
    assert betas.tolist() == pytest.approx(expected, rel=1e-12)


def test_warmup_ramps_over_its_fraction():
    betas = get_named_beta_schedule("warmup10", 1000)
    assert betas[:100].tolist() == pytest.approx(torch.linspace(1e-4, 0.02, 100, dtype=torch.float64).tolist())
    assert bool((betas[100:] == 0.02).all())


def test_betas_follow_alpha_bar_up_to_the_cap():
    betas = betas_for_alpha_bar(10, lambda u: (1 - u) ** 2, max_beta=0.7)
    wanted = [(1 - i / 10) ** 2 for i in range(1, 9)]
    assert (1 - betas).cumprod(0)[:8].tolist() == pytest.approx(wanted, rel=1e-12)
    assert betas[9] == 0.7


def test_betas_scale_with_the_length():
    assert get_named_beta_schedule("linear", 4000)[[0, -1]].tolist() == pytest.approx([1e-4 / 4, 0.02 / 4])


def test_unknown_name_says_nearest_and_all():
    with pytest.raises(ValueError, match=r"'lineer'; did you mean 'linear'.*known: linear.*squaredcos_cap_v2"):
        get_named_beta_schedule("lineer", 1000)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("jsd", "squaredcos_cap_v2")])
@pytest.mark.parametrize(
    ("steps", "message"), [(0, "at least 1 step"), (10, "T > 20"), (20, "is 1 for T = 20.*T > 20")]
)
def test_too_few_steps(name, steps, message):
    with pytest.raises(ValueError, match=message):
        get_named_beta_schedule(name, steps)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [21, 100])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_whole_chain_of_every_schedule_is_finite(name, steps, loop):
    process = create_diffusion("", name, learn_sigma=False, diffusion_steps=steps)
    assert bool(getattr(process, loop)(lambda x, t: 0.9 * x, (4, 3)).isfinite().all())
