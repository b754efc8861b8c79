"""Code written for the official SiT's train.py and sample.py runs with its imports swapped.

The bodies call what the scripts call, in their order; the VAE and the process group are left out.
"""

import argparse
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn

from ditfast import convert, reference
from ditfast.diffusion.transport import Sampler, create_transport
from ditfast.layers import SiT_models

ARGS = argparse.Namespace(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None)


@pytest.fixture
def model():
    """Every weight random, so that each counts; label 1000 is the null class."""
    torch.manual_seed(0)
    made = SiT_models["SiT-S/8"](input_size=16, num_classes=1000, depth=2)
    for p in made.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.02)
    return made


def transport_of(args):
    return create_transport(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    ema_params = OrderedDict(ema_model.named_parameters())
    for name, param in OrderedDict(model.named_parameters()).items():
        ema_params[name].mul_(decay).add_(param.data, alpha=1 - decay)


def official_training(model):
    """(losses, the checkpoint that the script saves)."""
    transport, losses, ema = transport_of(ARGS), [], deepcopy(model)
    for p in ema.parameters():
        p.requires_grad = False
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    torch.manual_seed(0)
    for _ in range(3):
        x, y = torch.randn(4, 4, 16, 16), torch.randint(1000, (4,))
        model_kwargs = dict(y=y)  # noqa: C408
        loss_dict = transport.training_losses(model, x, model_kwargs)
        loss = loss_dict["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model)
        losses.append(loss.item())
    return losses, {"model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "args": ARGS}


def test_training_loop(model, tmp_path):
    """As with the oracle's SiT, from the same weights and seeds."""
    oracle = reference.SiT(input_size=16, patch_size=8, hidden_size=384, depth=2, num_heads=6, num_classes=1000)
    oracle.load_state_dict(model.state_dict())
    (ours, checkpoint), (theirs, _) = official_training(model), official_training(oracle)
    assert ours == pytest.approx(theirs, rel=1e-4)
    torch.save(checkpoint, tmp_path / "0000003.pt")
    loaded, info = convert.load_official(tmp_path / "0000003.pt")
    assert info["which"] == "ema" and all(torch.equal(loaded[name], v) for name, v in checkpoint["ema"].items())


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
    model.eval()
    z = torch.randn(2, 4, 16, 16)
    z, y = torch.cat([z, z], 0), torch.cat([torch.tensor([3, 5]), torch.tensor([1000] * 2)], 0)
    samples = sample_fn(z, model.forward_with_cfg, **dict(y=y, cfg_scale=4.0))  # noqa: C408
    assert len(samples) == 7
    samples, _ = samples[-1].chunk(2, dim=0)
    assert samples.shape == (2, 4, 16, 16) and samples.isfinite().all() and not torch.equal(samples, z[:2])


@torch.no_grad()
def test_likelihood(model):
    pytest.importorskip("torchdiffeq")
    sample_fn = Sampler(transport_of(ARGS)).sample_ode_likelihood(sampling_method="dopri5", **ODE)
    logp, noise = sample_fn(torch.randn(2, 4, 16, 16), model.eval(), y=torch.tensor([3, 5]))
    assert logp.shape == (2,) and noise.shape == (2, 4, 16, 16) and logp.isfinite().all()
