"""CUDA graphs of samplers: replays draw the same samples to the bit, and share graphs where they can."""

import dataclasses
from collections import Counter
from functools import partial

import pytest
import torch

from ditfast.config import PRECISIONS, ConfigError, ModelConfig, RunConfig, SampleConfig, TransportConfig
from ditfast.cuda_graph import WARMUP, StepGraph
from ditfast.diffusion import ClassifierFreeGuidance, create_diffusion, samplers
from ditfast.layers import DiT
from ditfast.sample import Network, cycle_labels, draw
from tests.cuda_graph.stand_in import DEVICE, GPU, StandIn


def network(seed=0, **options):
    torch.manual_seed(seed)
    model = DiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=5, **options)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Network(PRECISIONS["fp32"].apply(model.to(DEVICE)).eval(), PRECISIONS["fp32"], DEVICE)


def config(**options):
    return RunConfig(sample=SampleConfig(**{"sampler": "ddim", "steps": 7, "guidance_scale": 2.0} | options))


def test_without_a_gpu():
    with pytest.raises(ConfigError, match="sample.cuda_graph needs a CUDA device"):
        draw(dataclasses.replace(network(), device=torch.device("cpu")), config(cuda_graph=True), torch.tensor([0]))


class TestSampling:
    """Seven steps and more are three that warm up, one recorded, and replays."""

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("options, graphs", [
        ({}, 1),
        ({"eta": 0.7}, 1),
        ({"sampler": "ddpm", "guidance_scale": 1.0}, 1),
        ({"sampler": "ddpm", "steps": 16, "guidance_interval": (0.3, 0.7)}, 2),
        ({"eta": 1.0, "steps": 10, "guidance_interval": (0.0, 0.5), "clip_denoised": True}, 2),
        ({"batch_size": 2, "guidance_channels": None}, 2),
    ], ids=str)  # fmt: skip
    def test_samples_are_the_same_to_the_bit(self, options, graphs, ahead, allowed):
        """The last batch is the smaller one, and batches have labels of their own."""
        labels, options = torch.tensor([0, 3, 3, 3, 4, 1, 2]), options | {"modulation_ahead": ahead}
        plain, replayed = (draw(network(), config(**options, cuda_graph=on), labels) for on in (False, True))
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == graphs and all(graph.replays > 1 for graph in StandIn.made)

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("options, graphs", [
        ({"sampler": "ode"}, 1),
        ({"sampler": "ode", "method": "heun"}, 2),
        ({"sampler": "sde", "guidance_interval": (0.5, 1.0), "steps": 16}, 2),
        ({"sampler": "sde", "method": "heun", "last_step": "none", "diffusion_form": "linear"}, 2),
        ({"sampler": "dpm-solver++", "steps": 8}, 1),
    ], ids=str)  # fmt: skip
    def test_other_solvers(self, options, graphs, ahead, allowed):
        """A step of Heun is two; where only one step in a batch is of a kind (no noise, no past), it stays as it is."""
        process = "ddpm" if options["sampler"] == "dpm-solver++" else "sit"
        transport = TransportConfig(sample_eps=1e-3 if process == "sit" else None)
        run = RunConfig(process=process, model=ModelConfig(learn_sigma=False), transport=transport)
        options = {"steps": 7, "guidance_scale": 2.0, "modulation_ahead": ahead} | options
        labels = torch.tensor([0, 3, 4, 1, 2])
        plain, replayed = (
            draw(
                network(learn_sigma=False),
                dataclasses.replace(run, sample=SampleConfig(**options, cuda_graph=on)),
                labels,
            )
            for on in (False, True)
        )
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == graphs and all(graph.replays > 1 for graph in StandIn.made)

    @pytest.mark.parametrize("options", [{}, {"steps": 10, "guidance_interval": (0.5, 1.0)}], ids=str)
    def test_two_networks(self, options, allowed):
        labels = cycle_labels(3, None, 5)
        plain, replayed = (
            draw(network(0), config(**options, cuda_graph=on), labels, unconditional=network(1)) for on in (False, True)
        )
        assert torch.equal(plain, replayed)

    def test_a_graph_holds_the_whole_step(self, allowed, monkeypatch):
        """No network, guidance or update of a replayed step passes through Python."""
        calls = Counter()

        def counted(module, name):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.update([name]) or real(*args, **kwargs))

        counted(samplers, "guided_step")
        counted(ClassifierFreeGuidance, "_both")
        counted(DiT, "forward_modulated")
        draw(network(), config(cuda_graph=True, steps=25), torch.tensor([1, 2]))
        assert calls == dict.fromkeys(("guided_step", "_both", "forward_modulated"), WARMUP + 1)

    def test_steps_of_a_progressive_loop(self):
        """Each is that of the plain loop, x_0 too, until the next one is asked for."""
        process = create_diffusion("ddim10", learn_sigma=False)
        x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)

        def model(x, t, y):
            return x.sin() * (1 + y.view(-1, 1, 1)) + t.view(-1, 1, 1) / 1000

        run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
        loops = (
            process.ddim_sample_loop_progressive(model, x.shape, x, model_kwargs={"y": y}, **options)
            for options in ({}, {"run_step": run_step})
        )
        for plain, replayed in zip(*loops, strict=True):
            assert torch.equal(plain["sample"], replayed["sample"])
            assert torch.equal(plain["pred_xstart"], replayed["pred_xstart"])

    @pytest.fixture
    def both(self):
        """both(model, **options): the samples of a loop of 12 steps, as it is and by graphs."""

        def run(model, **options):
            process = create_diffusion("ddim12", learn_sigma=False)
            x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
            run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
            kwargs = {"y": y} | options
            return [
                process.ddim_sample_loop(model, x.shape, x, model_kwargs=kwargs, **graph)
                for graph in ({}, {"run_step": run_step})
            ]

        return run

    @staticmethod
    def network(x, t, y):
        return x.sin() * (1 + y.view(-1, 1, 1)) + t.view(-1, 1, 1) / 1000

    def by_timestep(self, choose):
        class Chooses:
            def at_timestep(self, t):
                return choose(t)

        return Chooses()

    def test_guidances_of_several_weights(self, both):
        """Equal ones share a graph, though each step has one of its own; others do not."""
        chosen = self.by_timestep(lambda t: ClassifierFreeGuidance(self.network, 1.0 + (t > 500), 3))
        plain, replayed = both(chosen)
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == 2

    def test_a_guidance_that_is_changed(self, both):
        guidance = ClassifierFreeGuidance(self.network, 1.0, 3)

        def choose(t):
            guidance.scale = 2.0 if t > 500 else 4.0
            return guidance

        assert torch.equal(*both(self.by_timestep(choose)))

    def test_a_model_of_its_own_for_every_step_is_refused(self, both):
        chosen = self.by_timestep(lambda t: lambda x, _, y: x * (1 + t / 1000))
        with pytest.raises(ConfigError, match="need graph 9.*give the same model and options to every step"):
            both(chosen)

    def test_other_options_of_the_sampler_have_their_graph(self):
        process = create_diffusion("ddim10", learn_sigma=False)
        x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
        run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
        for clip in (False, True):
            options = {"clip_denoised": clip, "model_kwargs": {"y": y}}
            plain, replayed = (
                process.ddim_sample_loop(self.network, x.shape, x, **options, **graph)
                for graph in ({}, {"run_step": run_step})
            )
            assert torch.equal(plain, replayed)

    def test_further_arguments_of_the_model_are_refused(self, both):
        with pytest.raises(ConfigError, match="option: model_kwargs has w, which a recorded step"):
            both(lambda x, t, y, w: x * w, w=torch.ones(1, device=DEVICE))
