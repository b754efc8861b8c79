"""Drawing timesteps for training."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from ditfast.diffusion import create_diffusion, create_named_schedule_sampler
from ditfast.diffusion.timestep_sampler import LossSecondMomentResampler, UniformSampler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def process():
    return create_diffusion("20")


@pytest.fixture
def warm(process):
    """A resampler whose loss at t is about 1 + t."""
    sampler = LossSecondMomentResampler(process, history_per_term=3)
    for factor in (0.9, 1.0, 1.1):
        sampler.update_with_all_losses(torch.arange(20), factor * (1 + torch.arange(20.0)))
    return sampler


def test_uniform_sampler(process):
    t, weights = UniformSampler(process).sample(20000, generator=seeded())
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert bool((weights == 1).all())
    assert t.bincount(minlength=20).tolist() == pytest.approx([1000] * 20, rel=0.15)


def test_importance_sampling_follows_the_losses(warm):
    t, _ = warm.sample(200000, generator=seeded())
    expected = 0.999 * (1 + torch.arange(20.0)) / 210 + 0.001 / 20
    torch.testing.assert_close(t.bincount(minlength=20) / 200000, expected, rtol=0.1, atol=0)


def test_importance_weights_keep_the_mean_unbiased(warm):
    values = torch.arange(20.0) + 1
    t, weights = warm.sample(200000, generator=seeded())
    assert float((weights * values[t]).mean()) == pytest.approx(float(values.mean()), rel=0.02)
    assert float(values[t].mean()) != pytest.approx(float(values.mean()), rel=0.05)


def test_uniform_until_every_history_is_full(process):
    sampler = LossSecondMomentResampler(process, history_per_term=2)
    sampler.update_with_all_losses(torch.arange(20).repeat(2)[:-1], torch.arange(39.0))
    assert sampler.weights().tolist() == [1.0] * 20
    sampler.update_with_all_losses(torch.tensor([19]), torch.tensor([3.0]))
    assert sampler.weights().unique().numel() > 1


def test_history_keeps_the_last_losses(process):
    """Batches with repeated timesteps, more repeats than a history holds among them, against one loss at a time."""
    whole, single = (LossSecondMomentResampler(process, history_per_term=3) for _ in range(2))
    for seed in range(8):
        ts = torch.randint(0, 20, (64,), generator=seeded(seed))
        ts[:10] = 7
        losses = torch.rand(64, generator=seeded(100 + seed), dtype=torch.float64)
        whole.update_with_all_losses(ts, losses)
        for t, loss in zip(ts, losses, strict=True):
            single.update_with_all_losses(t[None], loss[None])
    assert torch.equal(whole.state_dict()["counts"], single.state_dict()["counts"])
    assert torch.equal(whole.state_dict()["history"], single.state_dict()["history"])


def test_resumed_sampler_draws_the_same(process, warm):
    warm.update_with_local_losses(torch.tensor([3, 3, 5]), torch.tensor([9.0, 8.0, 7.0]))
    resumed = LossSecondMomentResampler(process, history_per_term=3)
    resumed.load_state_dict(warm.state_dict())
    for sampler in (warm, resumed):
        sampler.update_with_local_losses(torch.tensor([3]), torch.tensor([50.0]))
    for mine, other in zip(warm.sample(64, generator=seeded()), resumed.sample(64, generator=seeded()), strict=True):
        assert torch.equal(mine, other)


def test_state_is_a_copy(warm):
    state = warm.state_dict()
    before = state["history"].clone()
    warm.update_with_local_losses(torch.tensor([3]), torch.tensor([50.0]))
    assert torch.equal(state["history"], before)


def test_all_zero_losses_give_a_uniform_draw(process):
    sampler = LossSecondMomentResampler(process, history_per_term=1)
    sampler.update_with_all_losses(torch.arange(20), torch.zeros(20))
    assert sampler.weights().tolist() == pytest.approx([0.001 / 20] * 20)


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist
from ditfast.diffusion import create_diffusion, create_named_schedule_sampler
rank, store = int(sys.argv[1]), dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, sys.argv[1] == "0")
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
sampler = create_named_schedule_sampler("loss-second-moment", create_diffusion("20"))
ts, losses = ([3, 5, 3], [1.0, 2.0, 3.0]) if rank == 0 else ([7], [4.0])
sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))
history = sampler.state_dict()["history"]
print([[t, *history[t, :2].tolist()] for t in (3, 5, 7)])
dist.destroy_process_group()
"""


def test_ranks_share_their_losses():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, rank, port], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in "01"
    ]
    for rank in ranks:
        assert rank.communicate(timeout=60)[0].strip() == "[[3, 1.0, 3.0], [5, 2.0, 0.0], [7, 4.0, 0.0]]"


def test_named_samplers(process):
    assert isinstance(create_named_schedule_sampler("uniform", process), UniformSampler)
    assert isinstance(create_named_schedule_sampler("loss-second-moment", process), LossSecondMomentResampler)
    with pytest.raises(ValueError, match=r"'unifrom'; did you mean 'uniform'.*known: uniform, loss-second-moment"):
        create_named_schedule_sampler("unifrom", process)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, p: s.load_state_dict({}), "another timestep sampler"),
        (lambda s, p: s.load_state_dict(LossSecondMomentResampler(p, 5).state_dict()), r"\(20, 3\).*got.*\(20, 5\)"),
        (lambda s, p: s.update_with_all_losses(torch.tensor([1]), torch.tensor([float("nan")])), "finite"),
        (lambda s, p: LossSecondMomentResampler(p, 0), ">= 1"),
        (lambda s, p: LossSecondMomentResampler(p, 3, 1.5), r"in \[0, 1\]"),
    ],
)
def test_bad_input(process, warm, call, message):
    with pytest.raises(ValueError, match=message):
        call(warm, process)
