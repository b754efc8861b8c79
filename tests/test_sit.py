"""Process sit through the same commands as ddpm: what a step computes, resuming, samplers, and official files."""

import math
from pathlib import Path

import pytest
import torch

from ditfast import checkpoint, cli
from ditfast.build import build_model, build_process, build_transport
from ditfast.config import PRECISIONS, ConfigError, ModelConfig, RunConfig, SampleConfig, TransportConfig, parse_config
from ditfast.diffusion import ClassifierFreeGuidance, Sampler, create_transport
from ditfast.distributed import World
from ditfast.layers import NormForm, SiT_models
from ditfast.sample import Network, SampleNoise, cycle_labels, draw, load_network, open_weights, prepare
from ditfast.train import Trainer, train
from tests.test_resume import contents, crash_and_resume, records

CPU = torch.device("cpu")
SIT = {
    "process": "sit", "diffusion.noise_schedule": "linear", "model.learn_sigma": False,
    "sample.sampler": "ode", "sample.clip_denoised": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def sit_run(tiny_run):
    """make(name, overrides) -> RunConfig of a short run of process sit."""
    return lambda name="run", overrides=None: tiny_run(name, SIT | (overrides or {}))


def network(**options):
    """A small network with every weight random, on 4-channel 8 x 8 latents of 5 classes."""
    shape = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": (8, 8), "in_channels": 4, "num_classes": 5}
    torch.manual_seed(0)
    model = build_model(ModelConfig(**shape | {"returns_sigma": False} | options))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Network(PRECISIONS["fp32"].apply(model).eval(), PRECISIONS["fp32"], CPU)


def config(transport=None, **options):
    return RunConfig(
        process="sit",
        model=ModelConfig(returns_sigma=False),
        transport=TransportConfig(**transport or {}),
        sample=SampleConfig(**{"steps": 4, "guidance_scale": 2.0} | options),
    )


class TestTraining:
    VARIANTS = {
        "accumulate": {"train.accumulate": 2, "train.precision": "bf16", "optim.clip_norm": 0.5},
        "lightning": {
            "transport.timestep_sampler": "lognormal", "transport.cosine_loss": True, "model.mlp": "swiglu",
            "model.position": ("sincos", "rope_2d"), "train.recompute": "mlp", "transport.timestep_shift": 0.5,
        },
        "score": {"transport.path": "GVP", "transport.prediction": "score", "transport.loss_weight": "velocity"},
    }  # fmt: skip

    @pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
    def test_a_resumed_run_ends_in_the_same_bits(self, variant, sit_run, monkeypatch):
        whole, broken = (sit_run(name, {"train.steps": 5} | variant) for name in ("whole", "broken"))
        train(whole)
        crash_and_resume(monkeypatch, broken, step=4)  # back to the checkpoint of step 3
        assert contents(broken.out) == contents(whole.out)
        assert records(broken.out) == records(whole.out)

    def test_gradient_is_that_of_the_official_loss(self, sit_run):
        run = Trainer(sit_run(overrides={"model.class_dropout_prob": 0.0, "train.batch_size": 8}), World(0, 1, CPU))
        torch.nn.init.normal_(run.model.final_layer.linear.weight)
        x, y = next(run.loader)
        t, weights, noise, drop = run._draw(x.shape[1:])
        assert t.dtype is torch.float32 and 0 <= t.min() < t.max() <= 1 and (weights == 1).all() and not drop.any()
        terms = create_transport().training_losses(run.model, x, {"y": y}, t=t, noise=noise)
        expected = torch.autograd.grad(terms["loss"].mean(), run.model.blocks[0].attn.qkv.weight)[0]
        found = run._backward(x, y, t, weights, noise, drop)
        run.close()
        assert found.keys() == {"loss"} and torch.equal(found["loss"], terms["loss"].detach())
        torch.testing.assert_close(run.model.blocks[0].attn.qkv.weight.grad, expected)

    def test_the_loss_falls_and_is_logged_by_time(self, sit_run):
        made = sit_run(overrides={"train.steps": 60, "train.log_every": 30, "transport.cosine_loss": True})
        train(made)
        first, last = records(made.out)
        # Seeds 0 to 7 end at 0.73 to 0.80 of the first window; half as many steps ended at up to 0.88.
        assert last["loss"] < 0.9 * first["loss"] and last["loss"] == pytest.approx(last["mse"] + last["cos"])
        assert len(last["loss_bins"]) == 10 and all(last["loss_bins"])

    @pytest.mark.parametrize("change", [{"transport.path": "GVP"}, {"process": "ddpm", "sample.sampler": "ddim"}])
    def test_another_process_does_not_resume(self, change, sit_run):
        train(sit_run(overrides={"train.steps": 1}))
        with pytest.raises(ConfigError, match=f"belongs to another run .*{next(iter(change))}"):
            train(sit_run(overrides=change))

    @pytest.mark.parametrize(
        "options", [[], ["--transport.cosine_loss=true", "--transport.timestep_sampler=lognormal"]], ids=len
    )
    def test_what_is_drawn_and_minimized_is_the_transports(self, options):
        made = parse_config(options, "digits-sit")
        process, times, end = build_process(made)
        generators = (torch.Generator().manual_seed(3) for _ in range(2))
        t, weights = times.sample(50, generator=next(generators))
        assert process == build_transport(made.transport) and end == 1 and (weights == 1).all()
        assert process.use_lognorm == process.use_cosine_loss == bool(options)
        assert torch.equal(t, process.sample_timesteps(50, generator=next(generators)))


class TestSampling:
    OPTIONS = [
        {"sampler": "ode"},
        {"sampler": "ode", "method": "heun", "timestep_shift": 0.3, "guidance_interval": (0.3, 1.0)},
        {"sampler": "sde", "diffusion_form": "linear", "diffusion_norm": 0.5, "last_step": "Tweedie"},
        {"sampler": "sde", "method": "heun", "diffusion_form": "SBDM", "batch_size": 2},
        {"sampler": "sde", "last_step": "none"},
        {"sampler": "sde", "timestep_shift": 0.3},
    ]

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_samples_are_those_of_the_official_functions(self, options, ahead):
        """Of as many steps, from the same noise."""
        net, labels = network(), cycle_labels(3, None, 5)
        drawn = draw(net, config(**options, modulation_ahead=ahead), labels, seed=3)
        made, noise = Sampler(create_transport()), SampleNoise(3, range(3), (4, 8, 8), CPU)
        common = {"timestep_shift": options.get("timestep_shift", 1.0)}
        if options["sampler"] == "ode":
            loop = made.sample_ode(
                sampling_method={"heun": "heun2"}.get(options.get("method"), "euler"), num_steps=5, **common
            )
        else:
            last = options.get("last_step", "Mean")
            forms = {"diffusion_form": "sigma"} | {k: v for k, v in options.items() if k.startswith("diffusion_")}
            loop = made.sample_sde(
                sampling_method=options.get("method", "euler").title(), num_steps=5 if last == "none" else 4,
                last_step=None if last == "none" else last, **forms, **common,
            )  # fmt: skip
        low, _ = options.get("guidance_interval", (0.0, 1.0))
        guided = ClassifierFreeGuidance(net.model, 2.0, 5, 3, (low, math.inf))
        expected = loop.sample(guided, noise(), {"y": labels}, noise)
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)

    def test_dopri5(self):
        pytest.importorskip("torchdiffeq")
        net, labels = network(), cycle_labels(2, None, 5)
        exact = draw(net, config(method="dopri5"), labels)
        rough, fine = (draw(net, config(method="euler", steps=steps), labels) for steps in (4, 100))
        assert (fine - exact).norm() < 0.2 * (rough - exact).norm()

    @pytest.mark.parametrize("options, message", [
        ({"sampler": "ddim"}, "sample.sampler ddim is of process ddpm, but process is sit, which has ode, sde"),
        ({"eta": 0.5}, "sample.eta is 0.5, an option of ddim, but the sampler is ode"),
        ({"clip_denoised": True}, "sample.clip_denoised is True, an option of ddpm and ddim"),
        ({"last_step": "none"}, "sample.last_step is 'none', an option of sde, but the sampler is ode"),
        ({"sampler": "sde", "method": "dopri5"}, "sample.method dopri5 solves the ode"),
        ({"method": "dopri5", "cuda_graph": True}, "sample.cuda_graph needs steps that are known ahead"),
        ({"method": "dopri5", "timestep_shift": 0.3}, "euler or heun, or timestep_shift 1 .`ditfast sample --times"),
        ({"diffusion_norm": -1.0}, "sample.diffusion_norm must be at least 0"),
        ({"timestep_shift": 0.0}, "sample.timestep_shift must be positive, got 0"),
        ({"sampler": "od"}, "must be one of .* got 'od'. Did you mean 'ode'"),
    ])  # fmt: skip
    def test_options_that_cannot_be(self, options, message):
        with pytest.raises(ConfigError, match=message):
            config(**options)

    def test_too_few_steps_and_a_singular_end(self):
        with pytest.raises(
            ConfigError, match="with sample.steps 1: it takes at least 2 steps with a last_step, here Mean"
        ):
            prepare(network(), config(sampler="sde", steps=1))
        prepare(network(), config(sampler="sde", steps=1, last_step="none"))
        with pytest.raises(ConfigError, match="sample.sampler ode .*: the drift is infinite .*take sample_eps > 0"):
            prepare(network(), config({"prediction": "noise", "sample_eps": 0.0}))


@pytest.mark.parametrize("arguments, message", [
    (["--transport.path", "GVP"], "transport.path is 'GVP', an option of process sit, but process is ddpm"),
    (["--process", "sit"], "diffusion.noise_schedule is 'squaredcos_cap_v2', an option of process ddpm, but"),
    (["--sample.sampler", "sde"], "sample.sampler sde is of process sit.* or --process sit$"),
    (["--sample.method", "heun"], "sample.method is 'heun', an option of ode and sde"),
    (["--model.returns_sigma", "false"], "process ddpm reads the variance .* set model.returns_sigma=true"),
])  # fmt: skip
def test_options_of_the_other_process_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(arguments, "digits")


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError, match="process sit reads no variance: set model.returns_sigma=false"):
        RunConfig(process="sit")
    with pytest.raises(ConfigError, match="cosine_loss compares velocities: .* with transport.prediction noise"):
        config({"prediction": "noise", "cosine_loss": True})
    with pytest.raises(ConfigError, match="transport.train_eps must be in 0 .. 0.5, got 0.5"):
        RunConfig(process="sit", model=ModelConfig(learn_sigma=False), transport=TransportConfig(train_eps=0.5))


class TestOfficialFile:
    @pytest.fixture
    def file(self, tmp_path):
        torch.manual_seed(0)
        model = SiT_models["SiT-S/8"](input_size=8)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
        torch.save(model.state_dict(), tmp_path / "SiT-S-8.pt")
        return tmp_path / "SiT-S-8.pt", model.eval()

    def test_is_a_sit_by_the_process(self, file):
        path, model = file
        opened = open_weights(path, process="sit")
        assert (opened.config.process, opened.config.sampler) == ("sit", "ode")
        assert opened.config.model.architecture == model.architecture
        assert open_weights(path).config.process == "ddpm", "as a DiT's, whose names they are"
        net = load_network(opened, CPU, "fp32")
        x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([0.3]), torch.tensor([7])
        with torch.no_grad():
            assert torch.equal(net(x, t, y=y), model(x, t, y))

    def test_by_the_command(self, file, tmp_path):
        out = [f"--out={tmp_path / 'drawn'}", "--device=cpu", "--count=1", "--classes=207", "--precision=fp32"]
        given = [str(file[0]), "--process=sit", "--sampler=sde", "--steps=2", "--guidance_scale=1.0"]
        assert cli.main(["sample", *given, *out]) == 0
        assert (tmp_path / "drawn" / "latents.npy").exists()

    def test_a_run_says_itself(self, sit_run, file):
        made = sit_run(overrides={"train.steps": 1})
        train(made)
        assert open_weights(made.out).config.process == "sit"
        with pytest.raises(ConfigError, match="says which process it is; --process is for files"):
            open_weights(made.out, process="sit")
        config_file = Path(made.out) / "config.yaml"
        with pytest.raises(ConfigError, match="config.yaml says which process it is"):
            open_weights(file[0], config_file, "sit")


class TestExport:
    def test_another_family(self, sit_run, tmp_path):
        """The official names of LightningDiT; sampled again with the run's configuration."""
        norm = NormForm("rms", weight=True)
        options = {"model.mlp": "swiglu", "model.position": ("sincos", "rope_2d"), "model.norm": norm}
        made = sit_run(overrides={"train.steps": 1} | options)
        train(made)
        file = tmp_path / "w.safetensors"
        assert cli.main(["export", made.out, str(file)]) == 0
        again = load_network(open_weights(file, Path(made.out) / "config.yaml"), CPU, "fp32")
        run = load_network(open_weights(made.out), CPU, "fp32")
        assert {"feat_rope.freqs_cos", "blocks.0.norm1.weight"} <= run.model.state_dict().keys()
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), name

    def test_what_no_official_model_has(self, sit_run, tmp_path, capsys):
        made = sit_run(overrides={"train.steps": 1, "model.norm": NormForm("rms")})
        train(made)
        assert cli.main(["export", made.out, str(tmp_path / "w.pt")]) == 2
        assert "norms, positions or heads that the official DiT has not" in capsys.readouterr().err


def test_samples_of_a_run_by_the_command(sit_run, tmp_path):
    made = sit_run(overrides={"train.steps": 2, "train.sample_every": 2})
    train(made)
    assert (Path(made.out) / "samples" / "step-00000002.png").exists()
    out = [f"--out={tmp_path / 'drawn'}", "--device=cpu", "--count=2"]
    assert cli.main(["sample", made.out, "--sampler=sde", "--steps=3", *out]) == 0
    assert checkpoint.load(made.out).state["config"]["process"] == "sit"


@pytest.mark.parametrize("options, warned", [
    (["--guidance_channels=2"], True), (["--guidance_channels=2", "--guidance_scale=3"], False), ([], False),
])  # fmt: skip
def test_other_guided_channels_with_the_same_scale_warn(options, warned, sit_run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ditfast.logs.setup_logging", lambda: None)  # which keeps the log from caplog
    made = sit_run(overrides={"train.steps": 1, "sample.guidance_channels": None})
    train(made)
    with caplog.at_level("WARNING", "ditfast"):
        cli.main(["sample", made.out, f"--out={tmp_path}", "--device=cpu", "--count=1", "--steps=2", *options])
    assert ("guidance_scale 4 is for other channels" in caplog.text) == warned


def test_a_run_of_no_sample_eps_takes_one_in_sampling(sit_run, tmp_path, capsys):
    made = sit_run(overrides={"train.steps": 1})
    train(made)
    given = ["sample", made.out, f"--out={tmp_path}", "--device=cpu", "--count=1", "--steps=3", "--sampler=sde"]
    given += ["--method=heun", "--last_step=none"]
    assert cli.main(given) == 2
    assert "undefined at t = [1.0]: take sample_eps > 0" in capsys.readouterr().err
    assert cli.main([*given, "--sample_eps=0.01"]) == 0
    assert cli.main([*given, "--sample_eps=0.5"]) == 2
    assert "transport.sample_eps must be in 0 .. 0.5, got 0.5" in capsys.readouterr().err
    train(sit_run(overrides={"train.steps": 2, "transport.sample_eps": 0.01}))
    assert checkpoint.load(made.out).step == 2
