"""What the official SiT's train.py and sample.py call of their transport runs with its import swapped.

The bodies call it in the scripts' order, with a small network in the place of SiT.
"""

import argparse

import pytest
import torch
from torch import nn

from ditfast.diffusion.transport import Sampler, create_transport

ARGS = argparse.Namespace(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None)


class Network(nn.Module):
    """A conditional network of 4 channels with the official guided forward; null class 10."""

    def __init__(self):
        super().__init__()
        self.conv, self.y_embedder = nn.Conv2d(5, 4, 3, padding=1), nn.Embedding(11, 4)

    def forward(self, x, t, y):
        times = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.conv(torch.cat([x, times], 1)) + self.y_embedder(y)[:, :, None, None]

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network()


def transport_of(args):
    return create_transport(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)


def test_training_loop(model):
    transport, opt, losses = transport_of(ARGS), torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0), []
    for _ in range(60):
        y = torch.randint(10, (16,))
        x = 0.1 * torch.randn(16, 4, 6, 6) + y.view(-1, 1, 1, 1) / 10
        loss_dict = transport.training_losses(model, x, dict(y=y))  # noqa: C408
        loss = loss_dict["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


ODE = {"num_steps": 7, "atol": 1e-6, "rtol": 1e-3}
SDE = {"diffusion_form": "sigma", "diffusion_norm": 1.0, "last_step": "Mean", "last_step_size": 0.04, "num_steps": 7}


@torch.no_grad()
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("sample_ode", {"sampling_method": "dopri5", "reverse": False, **ODE}),
        ("sample_ode", {"sampling_method": "euler", "reverse": True, **ODE}),
        ("sample_sde", {"sampling_method": "Euler", **SDE}),
        ("sample_sde", {"sampling_method": "Heun", **SDE}),
    ],
)
def test_sampling(model, sampler, options):
    if options["sampling_method"] == "dopri5":
        pytest.importorskip("torchdiffeq")
    sample_fn = getattr(Sampler(transport_of(ARGS)), sampler)(**options)
    z = torch.randn(2, 4, 6, 6)
    z, y = torch.cat([z, z], 0), torch.cat([torch.tensor([3, 5]), torch.tensor([10] * 2)], 0)
    samples = sample_fn(z, model.forward_with_cfg, **dict(y=y, cfg_scale=4.0))  # noqa: C408
    assert len(samples) == 7
    samples, _ = samples[-1].chunk(2, dim=0)
    assert samples.shape == (2, 4, 6, 6) and samples.isfinite().all() and not torch.equal(samples, z[:2])


@torch.no_grad()
def test_likelihood(model):
    pytest.importorskip("torchdiffeq")
    sample_fn = Sampler(transport_of(ARGS)).sample_ode_likelihood(sampling_method="dopri5", **ODE)
    logp, noise = sample_fn(torch.randn(2, 4, 6, 6), model, y=torch.tensor([3, 5]))
    assert logp.shape == (2,) and noise.shape == (2, 4, 6, 6) and logp.isfinite().all()
