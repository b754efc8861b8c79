"""Options, presets, files and precision policies."""

import dataclasses
import json
import re

import pytest
import torch

from ditfast.build import build_model
from ditfast.config import (
    PRECISIONS,
    PRESETS,
    ConfigError,
    RunConfig,
    SampleConfig,
    config_from,
    keys,
    load_config,
    parse_config,
    parse_sample,
    save_config,
)
from ditfast.layers import Architecture, NormForm
from ditfast.presets import PUBLISHED


def test_command_line_wins_over_file_and_file_over_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  lr: 0.5\n  beta1: 0.8\n")
    config = parse_config(["--config", str(file), "--optim.lr", "0.25", "--model.input_size", "[4,8]"], "digits")
    assert (config.optim.lr, config.optim.beta1, config.model.hidden_size) == (0.25, 0.8, 128)
    assert config.model.input_size == (4, 8)


def test_saved_config_reads_back_equal(tmp_path):
    config = parse_config(["--sample.guidance_interval", "[0.1,0.9]", "--optim.ema_rates", "[0.9,0.99]"], "DiT-B/4@512")
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_print_config_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--print_config"], "digits")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"{key.rpartition('.')[2]}:" in printed for key in keys())


def test_help_says_of_options_what_the_source_does(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], "digits-sit")
    printed = " ".join(capsys.readouterr().out.split())
    for said in (
        "noise by `diffusion`, or SiT's by `transport` (type: Literal['ddpm', 'sit'], default: sit)",
        "--model.kv_heads KV_HEADS heads of k and v, dividing num_heads; null: as many.",
        "--data.kind KIND digits (in scikit-learn)",
        "--sample.guidance_scale GUIDANCE_SCALE 1 is no guidance (type: float, default: 2.0)",
    ):
        assert said in printed
    assert "<class" not in printed


@pytest.mark.parametrize("preset", ["digits", "LightningDiT-XL/1", "LargeDiT-3B/2"])
def test_help_describes_every_option(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse_config(["--help"], preset)
    entries = re.findall(r"^  (?:-h, )?--([\w.]+)(.*)(?:\n {6,}(.*))?", capsys.readouterr().out, re.M)
    said = {name: re.sub(r"{.*?}|\(type: .*", "", " ".join(text)) for name, *text in entries}
    assert said.keys() >= set(keys()) and [name for name, text in said.items() if not re.search("[a-z]", text)] == []


def quick(name):
    """Whether a published preset stands for its family in the default run."""
    return name in ("DiT-S/8", "DiT-XL/2@512", "SiT-XL/2", "SiT-S/8@512", "LargeDiT-tiny/2", "LightningDiT-1p0B/1")


@pytest.mark.parametrize(
    "name",
    [n if quick(n) else pytest.param(n, marks=pytest.mark.full) for n in PRESETS if not n.startswith("digits")],
)
def test_published_presets_build_their_models(name):
    config = parse_config([], name)
    model_name, _, pixels = name.partition("@")
    make = PUBLISHED[model_name]
    with torch.device("meta"):
        model = build_model(config.model)
        expected = make(input_size=int(pixels) // 8) if pixels else make()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert model.architecture == expected.architecture
    assert (model.learn_sigma, model.y_embedder.dropout_prob) == (expected.learn_sigma, 0.1)
    assert config.process == ("ddpm" if model.architecture.returns_sigma else "sit")


def test_every_family_has_presets():
    for name in ("SiT-S/2", "SiT-L/4@512", "LargeDiT-600M/2", "LargeDiT-3B/2", "LargeDiT-7B/2", "LightningDiT-XL/1"):
        assert name in PRESETS


@pytest.mark.parametrize("name", ["LightningDiT-XL/1", "LightningDiT-1p6B/1"])
def test_lightning_dit_has_its_official_recipe(name):
    config = parse_config([], name)
    optim, sample = config.optim, config.sample
    assert (config.model.input_size, config.model.in_channels) == ((16, 16), 32)
    assert config.transport.cosine_loss and config.transport.timestep_sampler == "lognormal"
    assert (optim.lr, optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (2e-4, 0.9, 0.95, 0.0, 0.0)
    assert (optim.schedule, optim.warmup_steps, optim.ema_rates) == ("constant", 0, [0.9999])
    assert (config.train.batch_size, config.train.steps) == (1024, 80_000)
    assert (config.sampler, sample.method, sample.steps, sample.timestep_shift) == ("ode", "euler", 250, 0.3)
    assert (sample.guidance_scale, sample.guidance_interval, sample.guidance_channels) == (6.7, (0.125, 1.0), 3)


@pytest.mark.parametrize("name", ["DiT-B/4", "SiT-XL/2", "LargeDiT-3B/2"])
def test_other_families_train_by_the_recipe_of_dit(name):
    config, default = parse_config([], name), RunConfig()
    assert (config.optim, config.train) == (default.optim, default.train)


@pytest.mark.parametrize("name", ["digits", "digits-sit", "DiT-S/8", "LargeDiT-tiny/2", "LightningDiT-XL/1"])
def test_preset_keys_exist_and_are_saved(name, tmp_path):
    # A norm that is none by default is one option.
    assert {key.replace("qk_norm.", "qk_norm") for key in PRESETS[name]()} <= set(keys())
    config = parse_config([], name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_an_architecture_by_options():
    options = ["--model.norm.kind=rms", "--model.qk_norm.kind=rms", "--model.qk_norm.weight=true", "--model.mlp=swiglu"]
    model = parse_config([*options, "--model.position=[rope_1d]", "--model.kv_heads=2"], "digits").model
    assert model.architecture == Architecture(
        2, 128, 4, 4, 2, mlp="swiglu", norm=NormForm("rms"), qk_norm=NormForm("rms", weight=True), position=("rope_1d",)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optim.lrr", "1"], "unknown option 'optim.lrr'. Did you mean 'optim.lr'?"),
        (["--lr", "1"], "unknown option 'lr'. Did you mean 'optim.lr'?"),
        (["--train.precision", "bf61"], "precision must be one of .* got 'bf61'. Did you mean 'bf16'?"),
        (["--optim.lr", "fast"], "optim.lr.*float.*fast"),
        (["--process", "sat"], "process must be one of ddpm, sit, got 'sat'. Did you mean 'sit'?"),
        (["--transport.path", "gpv"], "transport.path must be one of Linear, GVP, VP, got 'gpv'. Did you mean 'GVP'?"),
        (["--model.block", "adaln-zero"], "model.block.*adaln_zero.*adaln-zero"),
        (["--train.steps", "0"], "train.steps must be at least 1, got 0"),
        (["--optim.ema_rates", "[1.5]"], r"optim.ema_rates must be positive and below 1, got \[1.5\]"),
        (["--train.save_every", "0"], "train.save_every must be at least 1, got 0"),
        (["--optim.clip_norm", "-1"], "optim.clip_norm must be at least 0, got -1"),
        (["--optim.beta1", "2"], r"optim.beta1 must be in 0 .. 1, got 2"),
        (["--optim.lr", "0"], "optim.lr must be positive, got 0"),
        (["--seed", "-1"], "seed must be in 0 .. 9.22337e[+]18, got -1"),
        (["--out", ""], "out is empty"),
        (["--sample.guidance_interval", "[0.5,0.5]"], "guidance_interval must be .* low < high"),
        (["--model.kv_heads", "None"], "^model.kv_heads must be int or null, got 'None'$"),
        (["--model.input_size", "8"], r"^model.input_size must be \[int, int\] or null, got '8'$"),
        (["--model.qk_norm", "rms"], r"^model.qk_norm must be options, --model.qk_norm.NAME or null, got 'rms'$"),
        (["--train.steps", "many"], "^train.steps must be int, got 'many'$"),
        (["--preset"], "expected one argument; presets: digits"),
        (["--optim.warmup_steps", "9999"], "optim.warmup_steps 9999 exceeds train.steps 1000"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_config(arguments, "digits")


def test_bad_key_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  batchsize: 3\n")
    with pytest.raises(ConfigError, match="unknown option 'train.batchsize'. Did you mean 'train.batch_size'?"):
        parse_config(["--config", str(file)])


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"unknown preset 'DiT-XL/3'. Did you mean 'DiT-XL/\d'"):
        parse_config([], "DiT-XL/3")


def test_sample_options_start_from_the_runs():
    run = SampleConfig(steps=7, guidance_scale=3.0)
    assert parse_sample(["--steps", "9"], run) == dataclasses.replace(run, steps=9)
    with pytest.raises(ConfigError, match="Did you mean 'guidance_scale'"):
        parse_sample(["--guidance_scal", "2"], run)


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_policies(name, tiny):
    from ditfast.layers import DiT

    policy = PRECISIONS[name]
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name.removesuffix("-fast"), torch.float32)
    fast = name.endswith("-fast")
    model = policy.apply(DiT(**tiny))
    assert next(model.parameters()).dtype is (low if fast else torch.float32)
    assert model.stream_dtype is policy.stream is (low if fast else torch.float32)
    assert policy.scales_loss == (low is torch.float16)
    assert (policy.optimizer, policy.ema) == (torch.float32, torch.float32)
    with policy.autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") == (name in ("bf16", "fp16"))
        product = torch.nn.functional.linear(*(torch.ones(2, 2, dtype=policy.params) for _ in range(2)))
        assert torch.backends.cuda.matmul.allow_tf32 == (name == "tf32")
    assert product.dtype is low and not torch.backends.cuda.matmul.allow_tf32


def test_defaults_are_the_published_recipe():
    config = RunConfig()
    optim = config.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.weight_decay, optim.warmup_steps) == (1e-4, 0.9, 0.999, 0.0, 0)
    assert (optim.ema_rates, optim.clip_norm, config.train.batch_size) == ([0.9999], 0.0, 256)


def test_a_file_may_name_a_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: DiT-S/8\noptim:\n  lr: 0.5\n")
    config = parse_config(["--config", str(file)], "digits")
    assert (config.model.hidden_size, config.model.patch_size, config.optim.lr) == (384, 8, 0.5)
    file.write_text("optim:\n  lr: 0.5\n")
    assert parse_config(["--config", str(file)], "digits").model.hidden_size == 128


@pytest.mark.parametrize("content", [b"", b"\x80\x81", b"a: [1,", b"- 1\n"])
def test_a_file_that_is_no_configuration_is_named(content, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="configuration file .*c.yaml"):
        load_config(file)


def test_a_checkpoints_configuration_reads_back():
    config = parse_config(["--sample.guidance_interval", "[0.1,0.9]"], "DiT-B/4@512")
    assert config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("policy", ["none", "ops", "mlp", "block", "block:3"])
def test_recompute_policies(policy):
    assert parse_config(["--train.recompute", policy], "DiT-S/2").train.recompute == policy


def test_an_unknown_recompute_policy_lists_those_there_are():
    with pytest.raises(ConfigError, match="train.recompute must be one of none, ops, mlp, block, or .*'blocks'"):
        parse_config(["--train.recompute", "blocks"], "DiT-S/2")


def test_the_default_recomputes_ops_but_not_in_the_small_preset():
    assert [parse_config([], name).train.recompute for name in ("DiT-XL/2", "digits")] == ["ops", "none"]
