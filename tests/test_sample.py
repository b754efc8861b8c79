"""Sampling: where weights come from, what guidance is asked of which network, and that a sample stands for itself."""

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import cli, convert, sample
from ditfast.build import build_model
from ditfast.config import PRECISIONS, ConfigError, ModelConfig, RunConfig, SampleConfig
from ditfast.diffusion import ClassifierFreeGuidance, TwoNetworkGuidance
from ditfast.sample import Network, cycle_labels, draw, load_network, open_weights, preview, write
from ditfast.train import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads."""
    torch.set_num_threads(1)


def network(seed=0, precision="fp32", **options):
    """A small network with every weight random, on 4-channel 8 x 8 latents of 5 classes."""
    shape = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": (8, 8), "in_channels": 4, "num_classes": 5}
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**shape | options))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Network(PRECISIONS[precision].apply(model).eval(), PRECISIONS[precision], CPU)


def config(**options):
    """Of sampling, on the linear schedule."""
    return RunConfig(sample=SampleConfig(**{"sampler": "ddim", "steps": 5, "guidance_scale": 2.0} | options))


@pytest.fixture
def trained(tiny_run):
    """The configuration of a short run with two averages, and checkpoints of steps 3 and 4."""
    made = tiny_run(overrides={"train.steps": 4, "optim.ema_rates": [0.5, 0.9], "optim.lr": 1e-2})
    train(made)
    return made


def weights(network):
    return {n: p for n, p in network.model.state_dict().items() if n != "pos_embed"}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())


class TestDraw:
    @pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
    def test_a_sample_does_not_depend_on_its_batch(self, sampler, eta):
        labels = cycle_labels(7, None, 5)
        options = {"sampler": sampler, "eta": eta}
        one, three, all_ = (draw(network(), config(batch_size=n, **options), labels, seed=3) for n in (1, 3, 7))
        assert one.shape == (7, 4, 8, 8) and one.dtype is torch.float32
        torch.testing.assert_close(one, all_, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(three, all_, atol=1e-4, rtol=1e-4)
        assert (all_[0] - all_[5]).abs().max() > 0.1, "samples of one label must differ"

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_seeds(self, sampler):
        labels = cycle_labels(2, None, 5)
        first, again = (draw(network(), config(sampler=sampler), labels, seed=0) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, draw(network(), config(sampler=sampler), labels, seed=1))

    def test_global_randomness_is_neither_read_nor_changed(self):
        net, labels = network(), cycle_labels(2, None, 5)
        before = torch.get_rng_state()
        first = draw(net, config(sampler="ddpm"), labels)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(9)
        assert torch.equal(draw(net, config(sampler="ddpm"), labels), first)

    def test_the_default_dtype_is_not_the_samples(self):
        before = torch.get_default_dtype()
        net, labels = network(), cycle_labels(2, None, 5)
        expected = draw(net, config(), labels)
        try:
            torch.set_default_dtype(torch.bfloat16)
            drawn = draw(net, config(), labels)
        finally:
            torch.set_default_dtype(before)
        assert drawn.dtype == torch.float32 and drawn.device.type == "cpu" and drawn.shape == expected.shape

    def test_ddpm_at_the_noise_of_each_sample_is_the_diffusions_own_loop(self):
        net, options = network(), config(sampler="ddpm", guidance_scale=1.0, modulation_ahead=False)
        noise = sample.SampleNoise(0, range(2), (4, 8, 8), CPU)
        labels = torch.tensor([1, 2])
        from ditfast.diffusion import create_diffusion

        expected = create_diffusion("5").p_sample_loop(
            net.model, (2, 4, 8, 8), noise(), clip_denoised=False, model_kwargs={"y": labels}, noise_fn=noise
        )
        torch.testing.assert_close(draw(net, options, labels), expected)

    @pytest.mark.parametrize("labels", [[5], [-1], [0, 7]])
    def test_labels_out_of_range(self, labels):
        with pytest.raises(ValueError, match=r"labels must be in 0..4"):
            draw(network(), config(), torch.tensor(labels))

    def test_every_batch_is_reported(self):
        done = []
        draw(network(), config(batch_size=2), cycle_labels(5, None, 5), on_batch=done.append)
        assert done == [2, 4, 5]

    @pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
    def test_low_precision_is_near_fp32(self, precision):
        labels = cycle_labels(4, None, 5)
        exact, rough = (draw(network(precision=p), config(), labels) for p in ("fp32", precision))
        assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.1


class TestGuidance:
    """`prepare` hands the options on; the arithmetic of guidance has its own tests."""

    def guided(self, net, unconditional=None, **options):
        return sample.prepare(net, config(**options), unconditional)[1]

    def test_scale_1_is_the_network_itself(self):
        net = network()
        assert self.guided(net, guidance_scale=1.0) is net

    @pytest.mark.parametrize("asked", [3, None])
    def test_channels(self, asked):
        guided = self.guided(network(), guidance_channels=asked)
        assert isinstance(guided, ClassifierFreeGuidance)
        assert (guided.channels, guided.scale, guided.null_class, guided.interval) == (asked, 2.0, 5, None)

    def test_more_channels_than_there_are(self):
        with pytest.raises(ConfigError, match="guidance_channels is 5, but there are 4 channels; null guides all"):
            self.guided(network(), guidance_channels=5)
        assert isinstance(self.guided(network(in_channels=1), guidance_channels=3), ClassifierFreeGuidance)

    def test_official_channels_matter(self):
        labels = cycle_labels(2, None, 5)
        three, four = (draw(network(), config(guidance_channels=c), labels) for c in (3, None))
        assert not torch.allclose(three, four)

    @pytest.mark.parametrize("interval, equal", [((0.0, 1.0), True), ((0.2, 0.7), False)])
    def test_interval(self, interval, equal):
        labels = cycle_labels(2, None, 5)
        everywhere, inside = (draw(network(), config(guidance_interval=i), labels) for i in (None, interval))
        assert torch.equal(everywhere, inside) == equal
        assert self.guided(network(), guidance_interval=interval).interval == (1000 * interval[0], 1000 * interval[1])

    def test_empty_part_of_the_interval_is_unguided(self):
        labels = cycle_labels(2, None, 5)
        never = draw(network(), config(guidance_interval=(0.9999, 1.0)), labels)
        assert torch.equal(never, draw(network(), config(guidance_scale=1.0), labels))

    def test_no_null_class(self):
        with pytest.raises(ConfigError, match="trained without label dropout; use sample.guidance_scale=1"):
            self.guided(network(class_dropout_prob=0.0))

    @pytest.mark.parametrize("options, null", [({}, 5), ({"num_classes": 1, "class_dropout_prob": 0.0}, 0)])
    def test_second_network(self, options, null):
        first, second = network(), network(1, **options)
        guided = self.guided(first, second)
        assert isinstance(guided, TwoNetworkGuidance) and (guided.scale, guided.null_class) == (2.0, null)
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([0, 3])
        with torch.no_grad():
            cond, uncond = first.model(x, t, y)[:, :4], second.model(x, t, torch.full_like(y, null))[:, :4]
            torch.testing.assert_close(guided(x, t, y=y)[:, :4], uncond + 2 * (cond - uncond))
        assert draw(first, config(), cycle_labels(2, None, 5), unconditional=second).isfinite().all()

    def test_second_network_that_is_only_conditional(self):
        with pytest.raises(ConfigError, match="has 5 classes and no null class"):
            self.guided(network(), network(1, class_dropout_prob=0.0))

    @pytest.mark.parametrize("options, message", [
        ({"sampler": "ddim", "steps": 150}, "ddim150"),
        ({"sampler": "ddpm", "steps": 1001}, "cannot keep 1001 of the 1000 steps"),
        ({"guidance_interval": (0.5, 0.5)}, "low < high"),
        ({"guidance_scale": -1.0}, "sample.guidance_scale must be at least 0, got -1.0"),
    ])  # fmt: skip
    def test_what_cannot_be(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.guided(network(), **options)


class TestWeights:
    def test_of_a_run_and_of_one_of_its_checkpoints(self, trained):
        out = Path(trained.out)
        newest, same_one, older = (
            load_network(open_weights(p), CPU) for p in (out, out / "step-00000004", out / "step-00000003")
        )
        assert same(weights(newest), weights(same_one)) and not same(weights(newest), weights(older))
        assert not any(p.requires_grad for p in newest.model.parameters()) and not newest.model.training

    def test_averages(self, trained):
        def of(rate):
            return weights(load_network(open_weights(trained.out), CPU, ema=rate))

        assert same(of(None), of(0.5)) and not same(of(0.5), of(0.9)) and not same(of(0), of(0.5))
        with pytest.raises(ConfigError, match="keeps EMAs of rates 0.5, 0.9, and 0 for the raw weights"):
            of(0.7)

    def test_another_precision(self, trained):
        net = load_network(open_weights(trained.out), CPU, "bf16-fast")
        assert {p.dtype for p in net.model.parameters()} == {torch.bfloat16}
        with pytest.raises(ConfigError, match="precision must be one of fp32, tf32, bf16"):
            load_network(open_weights(trained.out), CPU, "fp8")

    def test_of_an_official_file(self, tmp_path):
        torch.manual_seed(0)
        model = build_model(ModelConfig(**S8))
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
        path, state = tmp_path / "DiT-S-8.pt", model.state_dict()
        worse = {n: 2 * v for n, v in state.items()}
        torch.save({"model": worse, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1)}, path)
        opened = open_weights(path)
        configuration = opened.config
        assert configuration.model == ModelConfig(**S8) and configuration.diffusion.noise_schedule == "linear"
        net = load_network(opened, CPU, "fp32")
        assert same(net.model.state_dict(), state)
        samples = draw(net, dataclasses.replace(configuration, sample=config(steps=2).sample), torch.tensor([999]))
        assert samples.shape == (1, 4, 8, 8)

    def test_of_no_published_size(self, tmp_path):
        torch.save(network().model.state_dict(), tmp_path / "w.pt")
        with pytest.raises(ConfigError, match="is no published size of DiT"):
            open_weights(tmp_path / "w.pt")

    def test_a_file_of_no_published_size_with_its_configuration(self, trained, tmp_path):
        file, run = tmp_path / "w.safetensors", Path(trained.out)
        assert cli.main(["export", trained.out, str(file)]) == 0
        net = load_network(open_weights(file, run / "config.yaml"), CPU)
        assert same(weights(net), weights(load_network(open_weights(run), CPU)))
        with pytest.raises(ConfigError, match="carries its configuration"):
            open_weights(run, run / "config.yaml")

    def test_the_checkpoints_configuration_counts(self, trained, tmp_path):
        """Not the file beside it, which anyone may have edited or lost."""
        copy = tmp_path / "copy"
        shutil.copytree(trained.out, copy)
        (copy / "config.yaml").unlink()
        assert open_weights(copy).config == open_weights(trained.out).config

    @pytest.mark.parametrize("ema", [None, 0.9, 0])
    def test_export_and_start_from_it(self, ema, trained, tiny_run, tmp_path):
        arguments = [] if ema is None else [f"--ema={ema}"]
        assert cli.main(["export", trained.out, str(tmp_path / "w.pt"), *arguments]) == 0
        exported = convert.load_official(tmp_path / "w.pt")[0]
        assert list(exported) == convert.official_keys(2)
        net = load_network(open_weights(trained.out), CPU, "fp32", ema)
        assert same({n: v for n, v in exported.items() if n != "pos_embed"}, weights(net))
        started = tiny_run("started", {"train.init_from": str(tmp_path / "w.pt"), "train.steps": 1, "optim.lr": 1e-30})
        train(started)
        begun = load_network(open_weights(started.out), CPU)
        assert same(weights(begun), weights(net))


S8 = {
    "patch_size": 8, "hidden_size": 384, "depth": 12, "num_heads": 6, "input_size": (8, 8), "in_channels": 4,
    "num_classes": 1000,
}  # fmt: skip


class TestWrite:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images(self, channels, tmp_path):
        samples = torch.linspace(-1, 1, 5 * channels * 16).reshape(5, channels, 4, 4)
        assert write(tmp_path / "out", samples, torch.arange(5)) == [
            tmp_path / "out" / n for n in ("grid.png", "samples.npz")
        ]
        with np.load(tmp_path / "out" / "samples.npz") as saved:
            assert saved["arr_0"].shape == (5, 4, 4, channels) and saved["arr_0"].dtype == np.uint8
            assert saved["labels"].tolist() == [0, 1, 2, 3, 4]
        assert Image.open(tmp_path / "out" / "grid.png").size == (5 * 34 + 2, 34 + 2)

    @pytest.mark.parametrize("channels", [2, 4])
    def test_latents(self, channels, tmp_path):
        samples = 5 * torch.randn(3, channels, 8, 8)
        write(tmp_path, samples, torch.tensor([4, 2, 0]))
        assert np.array_equal(np.load(tmp_path / "latents.npy"), samples.numpy())
        assert np.load(tmp_path / "labels.npy").tolist() == [4, 2, 0]
        assert Image.open(tmp_path / "grid.png").mode == ("RGB" if channels == 4 else "L")

    def test_latents_are_shown_in_their_range(self):
        samples = torch.zeros(2, 4, 8, 8)
        samples[0, 0, 0, 0], samples[1, 1, 0, 0], samples[1, 3] = 8.0, -0.5, 100.0
        shown = sample.pictures(samples)
        assert shown[0, 0, 0].tolist() == [255, 128, 128] and shown[1, 0, 0].tolist() == [128, 0, 128]

    def test_preview_of_latents(self, tmp_path):
        net = network()
        net.model.train()
        run = dataclasses.replace(
            config(), model=ModelConfig(num_classes=5), train=dataclasses.replace(RunConfig().train, precision="fp32")
        )
        preview(net.model, run, CPU, tmp_path / "samples" / "step.png")
        assert Image.open(tmp_path / "samples" / "step.png").size == (5 * 34 + 2, 4 * 34 + 2) and net.model.training


@pytest.mark.parametrize("count, classes, expected", [(5, None, [0, 1, 2, 0, 1]), (3, [7, 2], [7, 2, 7])])
def test_cycle_labels(count, classes, expected):
    assert cycle_labels(count, classes, 3).tolist() == expected


class TestCommand:
    def test_of_a_run(self, trained, tmp_path, capsys):
        arguments = ["--count=6", "--classes=3,1", f"--out={tmp_path / 'drawn'}", "--steps=5", "--guidance_scale=1.5"]
        assert cli.main(["sample", trained.out, *arguments, "--device=cpu"]) == 0
        with np.load(tmp_path / "drawn" / "samples.npz") as saved:
            assert saved["arr_0"].shape == (6, 8, 8, 1) and saved["labels"].tolist() == [3, 1, 3, 1, 3, 1]
        assert str(tmp_path / "drawn" / "grid.png") in capsys.readouterr().out

    def test_with_a_second_network(self, trained, tiny_run, tmp_path):
        second = tiny_run("second", {"train.steps": 1})
        train(second)
        out = [f"--out={tmp_path / 'drawn'}", "--device=cpu", "--count=2"]
        assert cli.main(["sample", trained.out, "--unconditional", second.out, *out]) == 0

    @pytest.mark.parametrize("arguments, message", [
        (["{out}", "--classes=3,10"], "labels must be in 0..9"),
        (["{out}", "--ema=0.7"], "keeps EMAs of rates 0.5, 0.9"),
        (["{out}", "--precision=fp8"], "precision must be one of"),
        (["{out}", "--count=0"], "--count must be positive, got 0"),
        (["{out}", "--guidance_scal=3"], "Did you mean 'guidance_scale'?"),
        (["{out}", "--device=gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["{out}/nowhere"], "nowhere is missing"),
        (["{out}/log.jsonl"], "log.jsonl"),
    ])  # fmt: skip
    def test_bad_input(self, arguments, message, trained, capsys):
        given = [a.format(out=trained.out) for a in arguments]
        assert cli.main(["sample", *given]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
