"""Code written for the official DiT's train and sample scripts runs on ditfast with its imports swapped.

The bodies below call what those scripts call, in their order; the VAE and the process group are stand-ins. Each runs on
ditfast's model and on the oracle's, from the same weights and seeds, and must give the same numbers.
"""

import argparse
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn

from ditfast import convert, reference
from ditfast.diffusion import create_diffusion
from ditfast.layers import DiT_models

ARGS = argparse.Namespace(
    model="DiT-S/8", image_size=256, num_classes=1000, cfg_scale=4.0, num_sampling_steps=5, lr=1e-4
)


class StandInDDP(nn.Module):
    def __init__(self, module: nn.Module, device_ids: list[int]):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class StandInVAE:
    """Eight times smaller latents of four channels, drawn from nothing but the image."""

    def encode(self, x):
        latents = torch.nn.functional.avg_pool2d(x, 8)
        distribution = argparse.Namespace(sample=lambda: torch.cat([latents, latents.mean(1, keepdim=True)], dim=1))
        return argparse.Namespace(latent_dist=distribution)

    def decode(self, z):
        return argparse.Namespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8.0))


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    ema_params = OrderedDict(ema_model.named_parameters())
    for name, param in OrderedDict(model.named_parameters()).items():
        ema_params[name].mul_(decay).add_(param.data, alpha=1 - decay)


def official_training(models: dict, state: dict, steps: int) -> tuple[list[float], dict]:
    """(losses, the checkpoint that the script saves)."""
    device = "cpu"
    model = models[ARGS.model](input_size=ARGS.image_size // 8, num_classes=ARGS.num_classes)
    model.load_state_dict(state)
    ema = deepcopy(model).to(device)
    for parameter in ema.parameters():
        parameter.requires_grad = False
    model = StandInDDP(model.to(device), device_ids=[0])
    diffusion = create_diffusion(timestep_respacing="")
    vae = StandInVAE()
    opt = torch.optim.AdamW(model.parameters(), lr=ARGS.lr, weight_decay=0)
    update_ema(ema, model.module, decay=0)
    model.train()
    ema.eval()
    losses = []
    torch.manual_seed(0)
    for _ in range(steps):
        x, y = torch.rand(4, 3, 256, 256) * 2 - 1, torch.randint(0, ARGS.num_classes, (4,))
        with torch.no_grad():
            x = vae.encode(x).latent_dist.sample().mul_(0.18215)
        t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],), device=device)
        loss_dict = diffusion.training_losses(model, x, t, {"y": y})
        loss = loss_dict["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model.module)
        losses.append(loss.item())
    return losses, {
        "model": model.module.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "args": ARGS,
    }  # fmt: skip


@torch.no_grad()
def official_sampling(models: dict, state: dict) -> torch.Tensor:
    torch.manual_seed(0)
    device, latent_size = "cpu", ARGS.image_size // 8
    model = models[ARGS.model](input_size=latent_size, num_classes=ARGS.num_classes).to(device)
    model.load_state_dict(state)
    model.eval()
    diffusion = create_diffusion(str(ARGS.num_sampling_steps))
    class_labels = [207, 360]
    torch.manual_seed(1)
    z = torch.randn(len(class_labels), 4, latent_size, latent_size, device=device)
    y = torch.cat([torch.tensor(class_labels), torch.tensor([1000] * len(class_labels))], 0)
    z = torch.cat([z, z], 0)
    samples = diffusion.p_sample_loop(
        model.forward_with_cfg, z.shape, z, clip_denoised=False,
        model_kwargs={"y": y, "cfg_scale": ARGS.cfg_scale}, progress=True, device=device,
    )  # fmt: skip
    samples, _ = samples.chunk(2, dim=0)
    return StandInVAE().decode(samples / 0.18215).sample


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights none of which is zero, so that every path counts."""
    torch.manual_seed(0)
    model = reference.DiT_models[ARGS.model](input_size=32, num_classes=1000)
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.02)
    return model.state_dict()


def test_training_loop(state, tmp_path):
    ours, checkpoint = official_training(DiT_models, state, steps=3)
    theirs, _ = official_training(reference.DiT_models, state, steps=3)
    assert ours == pytest.approx(theirs, rel=1e-4)
    torch.save(checkpoint, tmp_path / "0000003.pt")
    loaded, info = convert.load_official(tmp_path / "0000003.pt")
    assert info["which"] == "ema" and all(torch.equal(loaded[k], v) for k, v in checkpoint["ema"].items())


def test_sampling(state):
    ours = official_sampling(DiT_models, state)
    assert ours.shape == (2, 3, 256, 256) and ours.isfinite().all()
    theirs = official_sampling(reference.DiT_models, state)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
