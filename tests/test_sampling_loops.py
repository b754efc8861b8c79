"""DPM-Solver++ and diffusers' schedulers as samplers of a run, against diffusers' own loop."""

import sys

import numpy as np
import pytest
import torch

from ditfast.build import build_diffusion
from ditfast.config import ConfigError, DiffusionConfig, RunConfig, SampleConfig
from ditfast.diffusion.dpm_solver import DpmSolver
from ditfast.sample import SampleNoise, cycle_labels, draw, prepare
from tests import test_sit
from tests.test_sample import CPU, network

LABELS = cycle_labels(3, None, 5)


def config(sampler, diffusion=None, **options):
    options = {"sampler": sampler, "steps": 6, "guidance_scale": 1.0} | options
    return RunConfig(diffusion=DiffusionConfig(**diffusion or {}), sample=SampleConfig(**options))


def diffusers_loop(scheduler, model, x, steps, generator=None):
    """As diffusers' pipelines have it; model(x, t) -> prediction."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    options = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = model(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def close(ours, theirs, tolerance=1e-4):
    """diffusers' tables are float32."""
    assert (ours - theirs).norm() <= tolerance * theirs.norm(), (ours - theirs).norm() / theirs.norm()


SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"clip_sample": False},
    "PNDMScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_diffusers_draws_what_its_own_loop_does(name):
    cls = getattr(pytest.importorskip("diffusers"), name)
    net = network()
    betas = np.linspace(1e-4, 0.02, 1000)
    scheduler = cls(num_train_timesteps=1000, trained_betas=betas, prediction_type="epsilon", **SCHEDULERS[name])
    noise = SampleNoise(0, range(3), (4, 8, 8), CPU)
    x = noise()
    generator = noise.generators if name == "DDPMScheduler" else None
    expected = diffusers_loop(scheduler, lambda x, t: net.model(x, t, LABELS)[:, :4], x, 6, generator)
    for batch_size in (3, 2):  # whose second batch begins anew, and whose samples have noise of their own
        close(draw(net, config(f"diffusers:{name}", batch_size=batch_size), LABELS), expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_takes_the_network_that_predicts_x_0_as_such(name):
    cls = getattr(pytest.importorskip("diffusers"), name)
    net, betas = network(), np.linspace(1e-4, 0.02, 1000)
    scheduler = cls(num_train_timesteps=1000, trained_betas=betas, prediction_type="sample", **SCHEDULERS[name])
    x = SampleNoise(0, range(3), (4, 8, 8), CPU)()
    expected = diffusers_loop(scheduler, lambda x, t: net.model(x, t, LABELS)[:, :4], x, 6)
    close(draw(net, config(f"diffusers:{name}", {"predict_xstart": True}), LABELS), expected)


FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_scheduler_of_diffusers_draws_a_sit_as_its_own_loop_does(name):
    cls, net = getattr(pytest.importorskip("diffusers"), name, None), test_sit.network()
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")
    noise, scheduler = SampleNoise(0, range(3), (4, 8, 8), CPU), cls(shift=4.0)
    x = noise()
    scheduler.set_timesteps(6)
    options = {"generator": noise.generators} if "LCM" in name else {}
    for t in scheduler.timesteps:
        with torch.no_grad():
            velocity = net.model(x, 1 - t.expand(3) / 1000, LABELS)
        x = scheduler.step(-velocity, t, x, **options).prev_sample
    for batch_size in (3, 2):
        options = {"sampler": f"diffusers:{name}", "timestep_shift": 0.25, "batch_size": batch_size}
        close(draw(net, test_sit.config(steps=6, guidance_scale=1.0, **options), LABELS), x)


def test_a_flow_scheduler_solves_the_ode_of_the_transport():
    pytest.importorskip("diffusers")
    net = test_sit.network()
    ode, flow = (
        draw(net, test_sit.config(sampler=name, steps=300, guidance_channels=None), LABELS)
        for name in ("ode", "diffusers:FlowMatchEulerDiscreteScheduler")
    )
    close(flow, ode, 0.01)


@pytest.mark.parametrize(("name", "transport", "options", "message"), [
    ("DDIMScheduler", {}, {}, "DDIMScheduler is not for flows"),
    (FLOWS[0], {"path": "GVP"}, {}, "steps by the velocity of a Linear path, this transport of path GVP"),
    (FLOWS[0], {"prediction": "noise"}, {}, "Linear path, this transport of path Linear predicts noise"),
    (FLOWS[0], {}, {"clip_denoised": True}, "FlowMatchEulerDiscreteScheduler does not clip"),
])  # fmt: skip
def test_a_flow_scheduler_that_cannot_sample_says_why(name, transport, options, message):
    pytest.importorskip("diffusers")
    with pytest.raises(ConfigError, match=message):
        prepare(test_sit.network(), test_sit.config(transport, sampler=f"diffusers:{name}", **options))


def test_guidance_and_the_interval_reach_diffusers():
    pytest.importorskip("diffusers")
    name, net = "diffusers:DDIMScheduler", network()
    plain, guided, never = (
        draw(net, config(name, **options), LABELS)
        for options in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (0.9999, 1.0)})
    )
    assert not torch.allclose(plain, guided)
    torch.testing.assert_close(never, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("diffusion", [{}, {"noise_schedule": "squaredcos_cap_v2", "predict_xstart": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 6, 20])
def test_dpm_solver_is_that_of_diffusers(diffusion, steps):
    """Its default: second order, midpoint, to sigma 0."""
    cls = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    process = build_diffusion(DiffusionConfig(**diffusion), learn_sigma=False)
    kind = "sample" if diffusion else "epsilon"
    scheduler = cls(num_train_timesteps=1000, trained_betas=process.betas.numpy(), prediction_type=kind)
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def model(x, t):
        return (x * (1 + t.view(-1, 1, 1) / 1000)).sin()

    solver = DpmSolver(process, steps)
    expected = diffusers_loop(scheduler, model, x, steps)
    assert solver.timesteps == scheduler.timesteps.tolist()
    close(solver.sample(model, x), expected, 1e-3 if diffusion else 1e-4)


def test_dpm_solver_of_a_run_with_a_learned_variance_and_guidance():
    net = network()
    ours = draw(net, config("dpm-solver++", steps=20, guidance_scale=2.0), LABELS)
    ddim = draw(net, config("ddim", steps=100, guidance_scale=2.0), LABELS)
    assert (ours - ddim).norm() < 0.1 * ddim.norm()
    clipped = draw(net, config("dpm-solver++", clip_denoised=True), LABELS)
    assert clipped.abs().max() <= 1, "the last step ends at the clamped x_0"


@pytest.mark.parametrize("name, diffusion, message", [
    ("CogVideoXDPMScheduler", {}, "CogVideoXDPMScheduler cannot step from a predicted epsilon: .* missing 2 required"),
    ("KDPM2DiscreteScheduler", {"predict_xstart": True}, "KDPM2DiscreteScheduler cannot step from a predicted x_0"),
    ("PNDMScheduler", {"predict_xstart": True}, "PNDMScheduler cannot step from a predicted x_0"),
    ("DDIMInverseScheduler", {}, "DDIMInverseScheduler leads from data to noise"),
])  # fmt: skip
def test_a_scheduler_that_cannot_sample_is_named(name, diffusion, message):
    pytest.importorskip("diffusers")
    with pytest.raises(ConfigError, match=message):
        prepare(network(), config(f"diffusers:{name}", diffusion))


@pytest.mark.parametrize("sampler, options, message", [
    ("dpm-solver++", {"steps": 1000}, "dpm-solver[+][+] takes 1 .. 999 steps of a process of 1000, got 1000"),
    ("diffusers:DDIMSchedler", {}, "diffusers has no scheduler 'DDIMSchedler'. Did you mean 'DDIMScheduler'"),
    ("diffusers:FlowMatchEulerDiscreteScheduler", {}, "is not for noise by betas"),
    ("diffusers:DDIMScheduler", {"timestep_shift": 0.3}, "timestep_shift is for process sit; leave it at 1"),
    ("diffusers:EulerDiscreteScheduler", {"clip_denoised": True}, "EulerDiscreteScheduler does not clip; set it to"),
])  # fmt: skip
def test_what_cannot_be(sampler, options, message):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=message):
        prepare(network(), config(sampler, **options))


def test_of_the_other_process_and_without_steps_for_a_graph():
    with pytest.raises(ConfigError, match="sample.cuda_graph cannot hold the steps of diffusers"):
        config("diffusers:DDIMScheduler", cuda_graph=True)
    with pytest.raises(ConfigError, match="must be one of .*diffusers:CLASS, got 'diffusers'"):
        config("diffusers")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="diffusers:DDIMScheduler needs diffusers: pip install"):
        prepare(network(), config("diffusers:DDIMScheduler"))
