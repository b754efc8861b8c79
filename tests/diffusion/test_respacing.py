"""Which steps a respaced chain keeps, and that it is the same diffusion on them."""

import pytest
import torch

from ditfast.diffusion import LossType, ModelMeanType, ModelVarType, create_diffusion, space_timesteps


@pytest.mark.parametrize(
    ("counts", "start", "end", "length"),
    [
        ("250", [0, 4, 8], [991, 995, 999], 250),
        ("50", [0, 20, 41, 61, 82], [999], 50),
        ("25", [0, 42, 83, 125], [999], 25),
        ("ddim25", [0, 40], [920, 960], 25),
        ("ddim50", [0, 20], [960, 980], 50),
        ("ddim1000", [0, 1], [999], 1000),
        ("10,15,20", [0, 37], [982, 999], 45),
        ([10, 15, 20], [0, 37], [982, 999], 45),
        (50, [0, 20, 41, 61, 82], [999], 50),
        ("1", [0], [0], 1),
    ],
)
def test_kept_steps(counts, start, end, length):
    kept = sorted(space_timesteps(1000, counts))
    assert (kept[: len(start)], kept[-len(end) :], len(kept)) == (start, end, length)


def test_sections_are_equal_and_the_first_ones_longer():
    assert sorted(space_timesteps(10, [1, 2, 2])) == [0, 4, 6, 7, 9]


def test_ddim_without_a_stride_says_which_counts_work():
    with pytest.raises(ValueError, match=r"exactly 150 of 1000.*143, 167.*divide 1000: 2, 4, 5.*250, 500, 1000"):
        space_timesteps(1000, "ddim150")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("1001", "cannot keep 1001 of the 1000 steps"),
        ("10,600", "cannot keep 600 of the 500 steps in section 1"),
        ("dddim50", "neither a count"),
        ("ddim", "neither a count"),
        ("10,", "neither a count"),
        ("0", "at least 1 step"),
        (0, "at least 1 step"),
        ([5, -1], "at least 1 step"),
    ],
)
def test_bad_respacing(counts, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(1000, counts)
    with pytest.raises(ValueError, match=message):
        create_diffusion(counts)


def test_respaced_betas_golden():
    betas = create_diffusion("250").betas
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.07751934499235003], rel=1e-12)


def test_respaced_chain_keeps_alpha_bars():
    whole, spaced = create_diffusion(""), create_diffusion("ddim50")
    torch.testing.assert_close(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12, atol=0)
    assert (spaced.num_timesteps, spaced.original_num_steps, len(spaced.use_timesteps)) == (50, 1000, 50)


@pytest.mark.parametrize("everything", [None, "", "1000", 1000, [1000]])
def test_no_respacing_is_the_whole_chain(everything):
    assert create_diffusion(everything).timestep_map == list(range(1000))


def test_models_are_given_original_timesteps():
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros(len(x), 8, 2, 2)

    create_diffusion("ddim50").p_mean_variance(model, torch.zeros(3, 4, 2, 2), torch.tensor([0, 1, 49]))
    assert seen[0].tolist() == [0, 20, 980] and seen[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "mean", "var", "loss"),
    [
        ({}, "EPSILON", "LEARNED_RANGE", "MSE"),
        ({"use_kl": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_KL"),
        ({"rescale_learned_sigmas": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
        ({"learn_sigma": False}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"learn_sigma": False, "sigma_small": True}, "EPSILON", "FIXED_SMALL", "MSE"),
        ({"predict_xstart": True}, "START_X", "LEARNED_RANGE", "MSE"),
    ],
)
def test_arguments_choose_the_types(arguments, mean, var, loss):
    process = create_diffusion("10", **arguments)
    assert process.model_mean_type is ModelMeanType[mean]
    assert process.model_var_type is ModelVarType[var]
    assert process.loss_type is LossType[loss]
