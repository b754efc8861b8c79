"""`ditfast plan`: what it prints and writes, from a name, a configuration and measured rows, and how it refuses."""

import json
import re

import pytest
import torch

from ditfast import cli
from ditfast.hardware import Ceilings, save_measured


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    """Wide tables, and no ceilings that were measured on this machine."""
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def table(printed: str) -> list[str]:
    """The lines of the table of layouts."""
    lines = printed.splitlines()
    first, end = (next(i for i, line in enumerate(lines) if line.startswith(s)) for s in ("  data ", "* is in ditfast"))
    return lines[first:end]


@pytest.mark.parametrize(("options", "count"), [
    (("--model=DiT-XL/2", "--gpus=64"), 9), (("--model=DiT-XL/2", "--policy=block:2"), 1),
    (("--model=LargeDiT-7B/2", "--gpus=8"), 9), (("--model=DiT-XL/2", "--gpus=4096", "--batch-size=100"), 9),
    (("--model=DiT-XL/2", "--image-size=1024", "--gpus=16", "--precision=tf32", "--batch-size=1024"), 9),
])  # fmt: skip
def test_80_columns_hold_all(options, count, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    plan(*options, "--gpu=h100")
    printed = capsys.readouterr().out
    _, *rows = table(printed)
    assert len(rows) == count and all(re.match(r"[* ] +\d+ ", row) for row in rows), "a line each"
    assert max(map(len, printed.splitlines())) <= 80, printed
    assert "…" not in printed


def test_the_table_of_layouts(capsys):
    assert plan("--model=DiT-XL/2", "--image-size=256", "--gpus=64", "--gpu=h100") == 0
    printed = capsys.readouterr().out
    assert "256 tokens an image, bf16, global batch 256, on 64 x H100 SXM in 8 nodes of 8; 711.7 GFLOP" in printed
    head, *rows = table(printed)
    assert head.split()[:5] == ["data", "tensor", "seq", "sharded", "recompute"]
    assert [row.split()[:3] for row in rows[:3]] == [
        ["*", "64", "none"], ["64", "optimizer", "none"], ["64", "full", "none"],
    ]  # fmt: skip
    assert rows[0].endswith("% slower") and rows[1].endswith("proposed") and rows[2].endswith("as fast")
    assert sum("*" in row for row in rows) == 1, "only plain data parallel is in ditfast"
    assert "datasheet ceilings of H100 SXM: 989 TFLOP/s" in printed and "gemm by datasheet 0.8" in printed
    assert "runs today: data 64, recompute none" in printed


def test_a_policy_is_taken_as_given(capsys):
    assert plan("--model=DiT-XL/2", "--gpu=NVIDIA H200", "--policy=block:2", "--precision=bf16-fast") == 0
    assert re.search(r"\* +1 +block:2 +41\.0 ", capsys.readouterr().out), "as ditfast doctor --model has it"


def test_tf32_has_a_rate_of_its_own(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert plan("--model=DiT-XL/2", "--gpu=h200", "--precision=tf32", f"--json={path}") == 0
    assert "datasheet ceilings of H200: 494 TFLOP/s" in capsys.readouterr().out
    first = json.loads(path.read_text())["candidates"][0]
    assert first["mfu"] == pytest.approx(first["images_per_s"] * 711.7e9 / 494e12, rel=1e-3)


def test_where_nothing_fits_the_status_is_1(capsys):
    assert plan("--model=DiT-XL/2", "--gpu=l4", "--policy=none", "--precision=bf16-fast") == 1
    assert "proposed: no layout (needs 76.3 GB of 24)" in capsys.readouterr().out


@pytest.mark.parametrize("options, fits", [
    (("--gpus=512", "--batch-size=100"), "--batch-size 512 or --gpus 4"),
    (("--batch-size=300", "--policy=none"), "--policy ops or --batch-size 150 or --gpus 2"),
    (("--gpus=8", "--batch-size=58"), "--batch-size 56 or --gpus 2"),
])  # fmt: skip
def test_where_nothing_fits_it_says_what_is_near_and_does(options, fits, capsys):
    common = ("--model=DiT-XL/2", "--gpu=h100", "--precision=bf16-fast")
    plan(*common, *options)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("runs today: no layout"))
    assert line.endswith(f"what fits: {fits}")
    for option in fits.split(" or "):
        name, value = option.split()
        kept = [each for each in options if not each.startswith(name)]
        assert plan(*common, *kept, f"{name}={value}") == 0 and "runs today: no" not in capsys.readouterr().out


def test_the_title_has_the_size_that_is_planned(capsys):
    for options, title in ((["--model=DiT-S/2@512", "--image-size=256"], "DiT-S/2, 256 tokens"),
                           (["--model=DiT-S/2", "--image-size=1024"], "DiT-S/2@1024, 4096 tokens"),
                           (["--model=DiT-S/2@512"], "DiT-S/2@512, 1024 tokens")):  # fmt: skip
        assert plan(*options, "--gpu=h100") == 0
        assert capsys.readouterr().out.startswith(title)


def test_a_number_too_long_for_a_table_has_an_exponent(capsys):
    plan("--model=DiT-S/2", "--gpu=h100", "--gpus=16", "--network=1e-30")
    assert max(len(digits) for digits in re.findall(r"\d+", capsys.readouterr().out)) < 12


def test_json_has_all_of_it(tmp_path):
    path = tmp_path / "plan.json"
    assert plan("--model=DiT-S/2", "--nodes=2", "--gpus-per-node=4", "--gpu=a100", f"--json={path}") == 0
    tree = json.loads(path.read_text())
    assert tree["gpus"] == 8 and tree["gpu"]["name"] == "A100 SXM 80GB" and tree["runs_today"] == "data 8"
    first = tree["candidates"][0]
    assert first["layout"] == {"data": 8, "shard": "none", "tensor": 1, "sequence": 1, "runs_today": True}
    parts = ("gemm", "attention", "elementwise", "gelu", "bias", "optimizer", "rest", "communication")
    assert first["step_ms"] == pytest.approx(sum(first["time"][part] for part in parts))
    assert first["memory_bytes"] == pytest.approx(sum(first["memory"].values()))
    assert first["images_per_s"] == pytest.approx(256e3 / first["step_ms"])
    assert tree["factors"].keys() >= {"gemm", "attention", "link", "network"}
    assert all(factor["reason"] for factor in tree["factors"].values())


CONFIG = """
preset: DiT-S/4
model: {input_size: [64, 32]}
train: {batch_size: 96, accumulate: 3, precision: bf16-fast}
optim: {ema_rates: [0.99, 0.9999]}
"""


def test_a_configuration_of_ones_own(tmp_path, capsys):
    path, json_path = tmp_path / "mine.yaml", tmp_path / "plan.json"
    path.write_text(CONFIG)
    assert plan(f"--config={path}", "--gpu=h100", f"--json={json_path}") == 0
    assert "128 tokens an image, bf16-fast, global batch 96, on 1 x H100 SXM" in capsys.readouterr().out
    tree = json.loads(json_path.read_text())
    memory = tree["candidates"][0]["memory"]
    assert memory["emas"] == 2 * 2 * memory["weights"], "two EMAs in fp32 of bf16 weights"


@pytest.mark.parametrize("preset, options, title", [
    ("LightningDiT-XL/1", [], "bf16, global batch 1024,"), ("digits", [], "fp32, global batch 128,"),
    ("LightningDiT-XL/1", ["--batch-size=64", "--precision=bf16-fast"], "bf16-fast, global batch 64,"),
])  # fmt: skip
def test_a_preset_has_its_batch_and_precision(preset, options, title, capsys):
    plan(f"--model={preset}", "--gpus=8", "--gpu=h100", *options)
    assert title in capsys.readouterr().out


def test_a_configuration_without_sizes_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: digits\n")
    assert plan(f"--config={path}", "--gpu=h100") == 2
    assert "model.input_size, model.in_channels, model.num_classes must be set" in capsys.readouterr().err


def test_ceilings_measured_here_or_in_a_file_are_taken(tmp_path, capsys):
    found = Ceilings(4000, {"bf16": 700}, "measured", "NVIDIA H200", torch.__version__)
    save_measured(found)
    assert plan("--model=DiT-S/2", "--gpu=h200") == 0
    printed = capsys.readouterr().out
    assert "measured ceilings of NVIDIA H200: 700 TFLOP/s, copy 4000 GB/s" in printed
    assert "by datasheet 0." not in printed, "what is measured is not derated"
    assert plan("--model=DiT-S/2", "--gpu=h200", "--ceilings=datasheet") == 0
    assert "datasheet ceilings of H200: 989" in capsys.readouterr().out
    other = save_measured(Ceilings(4200, {"bf16": 750}, "measured", "NVIDIA H200", "2.0"), tmp_path / "other.json")
    assert plan("--model=DiT-S/2", "--gpu=h200", f"--ceilings={other}") == 0
    assert "750 TFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_one_must_be_named(capsys):
    assert plan("--model=DiT-S/2") == 2
    assert "name one, such as --gpu h100" in capsys.readouterr().err


def test_the_gpu_here_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert plan("--model=DiT-S/2") == 0
    assert "on 1 x H100 PCIe" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    ([], "what to plan for"), (["--model=DiT-XL2"], "unknown model 'DiT-XL2'. Did you mean 'DiT-XL/2'?"),
    (["--model=dit-xl/2"], "unknown model 'dit-xl/2'. Did you mean 'DiT-XL/2'?"),
    (["--model=DiT-S/2", "--gpu=h1000"], "GPU 'h1000'. Did you mean 'h100'?"),
    (["--model=DiT-S/2", "--policy=blok"], "recompute must be one of none, ops, mlp, block"),
    (["--model=DiT-S/2", "--precision=bf17"], "precision must be one of"),
    (["--model=DiT-S/2", "--gpus=4", "--nodes=2"], "--gpus 4 contradicts --nodes 2 with 8 in each"),
    (["--model=DiT-S/2", "--nodes=0"], "--nodes must be positive, got 0"),
    (["--model=DiT-S/2", "--image-size=250"], "--image-size of DiT-S/2 must be a positive multiple of 16, got 250"),
    (["--model=DiT-S/2", "--config=a.yaml"], "--model and --config both name a model"),
    (["--config=a.yaml", "--image-size=256"], "--image-size is of use only with --model"),
    (["--config=no-such.yaml"], "cannot read the configuration file no-such.yaml"),
    (["--model=DiT-S/2", "--ceilings=no-such.json"], "no-such.json has no measured ceilings of h100"),
    (["--model=DiT-S/2", "--batch-size=0"], "--batch-size must be positive, got 0"),
    (["--model=DiT-S/2", "--gpu=h100", "--json=/"], "--json / is a folder, expected a file's name"),
    (["--model=DiT-S/2", "--gpu=v100"], "V100 SXM has no GEMM rate of bf16"),
])  # fmt: skip
def test_refusals(options, message, capsys):
    named = [] if any(option.startswith("--gpu=") for option in options) or not options else ["--gpu=h100"]
    assert plan(*options, *named) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["SiT-XL/2", "LightningDiT-XL/1", "LargeDiT-3B/2", "LargeDiT-600M/2"])
def test_every_family_has_a_plan(model, capsys):
    assert plan(f"--model={model}", "--gpu=h200", "--policy=ops", "--gpus=8", "--batch-size=256") == 0
    assert "256 tokens an image, bf16, global batch 256, on 8 x H200" in capsys.readouterr().out
