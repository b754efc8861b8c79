"""The peers of the training step do the job: ditfast's loss, gradients and update, in every recipe and policy."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench.baselines import FLOAT64, Baseline, fastest_sdpa, plain_losses
from bench.oracles import Recipe
from bench.suites.model import PEERS
from bench.training import TINY, fill_zeros, random_batch, trainer_for
from ditfast.build import build_diffusion, build_model
from ditfast.config import PRECISIONS, DiffusionConfig, OptimConfig, Precision
from ditfast.diffusion import create_transport
from ditfast.distributed import World
from ditfast.kernels.tf32 import dot_precision

CPU, PLAIN = torch.device("cpu"), Recipe()
PROCESS = build_diffusion(DiffusionConfig(), learn_sigma=True)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, decay="all", eps=1e-3, ema_rates=[0.9])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(TINY)
    fill_zeros(model.parameters())
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def peer(weights, recipe: Recipe = PLAIN, precision: Precision = FLOAT64) -> Baseline:
    return Baseline(recipe, TINY, weights, precision, OPTIM, PROCESS, 4)


def exact_batch() -> list[torch.Tensor]:
    return [v.double() if v.is_floating_point() else v for v in random_batch(TINY, 4, CPU)]


@pytest.mark.parametrize("cosine", [False, True])
def test_sits_loss_is_ditfasts(cosine):
    x, y, _, _, noise, _ = exact_batch()
    process, t = create_transport(use_cosine_loss=cosine), torch.linspace(0, 1, 4, dtype=torch.float64)

    def network(x_t, t, **_):
        return (x_t * (1 + t.view(-1, 1, 1, 1))).sin()

    ours = process.training_losses(network, x, t=t, noise=noise)["loss"]
    torch.testing.assert_close(plain_losses(process, lambda x_t, t, _: network(x_t, t), x, t, y, noise), ours)


def test_processes_without_a_plain_loss_are_refused():
    x, y, t, _, noise, _ = exact_batch()
    with pytest.raises(ValueError, match="a velocity on the path Linear, got noise on GVP"):
        plain_losses(create_transport("GVP", "noise"), lambda x_t, *_: x_t, x, t, y, noise)


def test_the_loss_is_ditfasts():
    x, y, t, _, noise, _ = exact_batch()
    out = torch.randn(4, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = PROCESS.training_losses(lambda *_, **__: out, x, t, {"y": y}, noise=noise)["loss"]
    torch.testing.assert_close(plain_losses(PROCESS, lambda *_: out, x, t, y, noise), ours)


@pytest.mark.parametrize("name", ["eager", "fast-DiT", pytest.param("compile", marks=pytest.mark.full)])
def test_every_recipe_has_the_reference_gradients(name, weights):
    expected = peer(weights).gradients(exact_batch())
    found = peer(weights, PEERS[name]).gradients(exact_batch())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-10)


def test_the_truth_embeds_timesteps_in_float64(weights):
    t = torch.tensor([999, 500])
    found = peer(weights).model.t_embedder
    inner, found.mlp = found.mlp, torch.nn.Sequential(torch.nn.Identity().double())
    found.mlp[0].weight = inner[0].weight
    angle = 999 * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(found(t)[0, :128], angle.cos(), rtol=0, atol=1e-11)


def test_gradients_in_chunks_are_those_of_the_batch(weights):
    whole, chunked = peer(weights).gradients(exact_batch()), peer(weights).gradients(exact_batch(), rows=3)
    for key, value in whole.items():
        torch.testing.assert_close(chunked[key], value)


@pytest.mark.parametrize("recipe", [Recipe(), PEERS["fast-DiT"]], ids=["foreach", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-fast", "fp16"])
def test_two_steps_move_weights_and_average_as_ditfasts(precision, recipe):
    batch, policy = random_batch(TINY, 4, CPU), PRECISIONS[precision]
    with trainer_for(TINY, 4, precision, World(0, 1, CPU)) as trainer:
        own = trainer.optimizer
        own.config, own.decays = OPTIM, [OPTIM.weight_decay] * len(own.masters)
        own.schedule(0)
        own._alphas.fill_(1 - OPTIM.ema_rates[0])
        before = {name: m.detach().clone() for name, m in own.masters.items()}
        average = next(iter(own.emas.values()))
        for name, value in before.items():
            average[name].copy_(value)
        mine = Baseline(recipe, TINY, before, policy, OPTIM, trainer.process, 4)
        for _ in range(2):
            trainer.learn(*batch)
            mine(*batch)
    slack = 1e-3 if precision == "fp32" else 0.03
    for name, value in before.items():
        for ours, theirs in ((mine.masters, own.masters), (mine.ema, average)):
            moved, expected = ours[name].detach() - value, theirs[name].detach() - value
            assert (moved - expected).norm() <= slack * expected.norm(), name
            assert expected.norm() > 0, name
        assert torch.equal(mine.parameters[name], mine.masters[name].to(policy.params)), name


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_follow_the_policy_forward_and_backward(precision, weights):
    seen = {"forward": [], "backward": []}

    def note(way: str) -> None:
        seen[way].append(dot_precision(torch.float32))

    baseline = peer(weights, PEERS["fast-DiT"], PRECISIONS[precision])
    for layer in (block.mlp.fc1 for block in baseline.model.blocks):
        layer.register_forward_hook(lambda *_: note("forward"))
        layer.register_full_backward_hook(lambda *_: note("backward"))
    baseline(*random_batch(TINY, 4, CPU))
    expected = "tf32" if precision == "tf32" else "ieee"
    assert {way: set(found) for way, found in seen.items()} == {"forward": {expected}, "backward": {expected}}
    assert len(seen["forward"]) == 2 * TINY.depth, "its checkpoints compute again"
    assert dot_precision(torch.float32) == "ieee"


def test_fp16_gradients_are_unscaled(weights):
    batch = random_batch(TINY, 4, CPU)
    exact, found = peer(weights).gradients(exact_batch()), peer(weights, precision=PRECISIONS["fp16"]).gradients(batch)
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(found[name], exact[name], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_the_fastest_attention_is_one_that_can(kv_heads):
    found = fastest_sdpa(replace(TINY, kv_heads=kv_heads), 2, torch.float32, CPU, train=True)
    assert found is SDPBackend.FLASH_ATTENTION, "the only one of the three that a CPU has"
