"""The command line: what each sub-command prints, writes and returns, and how it refuses."""

import re

import numpy as np
import pytest
import torch

from ditfast import __version__, cli, convert
from ditfast.config import PRESETS
from ditfast.layers import DiT

SMALL = [
    "--model.hidden_size=32", "--model.depth=1", "--model.num_heads=2", "--train.steps=2", "--train.batch_size=16",
    "--train.log_every=1", "--train.tensorboard=false", "--optim.warmup_steps=0", "--train.sample_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", f"--out={out}", *SMALL]) == 0
    return out


def test_usage_without_a_command(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"ditfast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sample", "export"])
def test_help_says_what_becomes_of_each_family(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"\b{family}\b", printed) for family in ("DiT", "SiT", "LightningDiT", "LargeDiT"))


def test_train_writes_a_run(run):
    assert {"config.yaml", "log.jsonl", "step-00000002"} <= {p.name for p in run.iterdir()}


def test_sample(run, tmp_path, capsys):
    options = ["--count=5", "--classes=3,4", f"--out={tmp_path}", "--steps=4", "--seed=1"]
    assert cli.main(["sample", str(run), *options]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "grid.png"), str(tmp_path / "samples.npz")]
    written = np.load(tmp_path / "samples.npz")
    assert written["arr_0"].shape == (5, 8, 8, 1) and written["arr_0"].dtype == np.uint8
    assert written["labels"].tolist() == [3, 4, 3, 4, 3]


def test_export_reads_back_in_the_official_format(run, tmp_path, capsys):
    file = tmp_path / "official.pt"
    assert cli.main(["export", str(run), str(file)]) == 0
    state = torch.load(file, weights_only=True)
    arguments = convert.infer_config(state)
    assert (arguments["hidden_size"], arguments["depth"], arguments["num_classes"]) == (32, 1, 10)
    DiT(8, 2, 1, 32, 1, 2, num_classes=10).load_state_dict(state)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--optim.lrr=1"], "unknown option 'optim.lrr'. Did you mean 'optim.lr'?"),
        (["train", "--preset=digit"], "unknown preset 'digit'. Did you mean 'digits'?"),
        (["sample", "nowhere"], "nowhere is missing"),
        (["train", "--data.kind=folder"], "needs path"),
        (["train", "--device=cuda"], "sees no CUDA device"),
        (["train", "--tuned=none.json"], "there are no measured configs at none.json"),
        (["sample", "nowhere", "--tuned=none.json"], "there are no measured configs at none.json"),
        (["sample", "nowhere", "--count=0"], "--count must be positive"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("ditfast: error: ") and message in errors[0]


def test_sample_refuses_labels_the_model_does_not_have(run, capsys):
    assert cli.main(["sample", str(run), "--classes=3,10"]) == 2
    assert "labels must be in 0..9" in capsys.readouterr().err


@pytest.mark.parametrize("precision, state, expected", [
    ("bf16-fast", "13.5 GB of weights, gradients, optimizer and EMA, and", {
        "none": ["32,256", "59.2", "74.8"], "ops": ["25,344", "46.5", "62.1"], "mlp": ["16,128", "29.6", "45.2"],
        "block": ["2,304", "4.2", "19.8"], "block:2": ["13,824", "25.4", "41.0"],
    }),
    # 675 million weights: 20 bytes of each, and 2 of autocast's copy.
    ("bf16", "14.8 GB of weights, gradients, optimizer and EMA and, at most, autocast's copies, and", {
        "ops": ["27,648", "50.7", "68.0"],
    }),
])  # fmt: skip
def test_doctor_estimates_memory(precision, state, expected, capsys, monkeypatch):
    """The rows of performance.md's table for DiT-XL/2 at batch 256, its static state, and one block more at work."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--model", "DiT-XL/2", "--batch-size", "256", "--precision", precision]) == 0
    printed = capsys.readouterr().out
    assert "65536 tokens" in printed and state in printed
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if len(cells := line.replace("│", " ").split()) == 4}
    assert expected.items() <= rows.items()


def test_doctor_takes_published_resolutions(capsys):
    assert cli.main(["doctor", "--model=DiT-S/2@512", "--batch-size=4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Memory of training DiT-S/2 at 512 pixels, batch 4 (4096 tokens)")
    assert "Backend of each op" not in printed


OF_EACH_FAMILY = ("digits", "digits-sit", "DiT-S/8", "SiT-S/8@512", "LargeDiT-tiny/2", "LightningDiT-B/2")


@pytest.mark.parametrize(
    "name", [n if n in OF_EACH_FAMILY else pytest.param(n, marks=pytest.mark.full) for n in PRESETS]
)
def test_doctor_and_plan_know_every_preset(name, capsys):
    network, _, pixels = name.partition("@")
    assert cli.main(["doctor", f"--model={name}", "--batch-size=4"]) == 0
    size = 8 if network.startswith("digits") else pixels or 256
    assert capsys.readouterr().out.startswith(f"Memory of training {network} at {size} pixels, batch 4 (")
    assert cli.main(["plan", f"--model={name}", "--gpu=h100", "--batch-size=1"]) in (0, 1)
    precision = "fp32" if network.startswith("digits") else "bf16"
    assert re.match(rf"{name}, \d+ tokens an image, {precision}, global batch 1, on 1 x H100", capsys.readouterr().out)


@pytest.mark.parametrize("options, message", [
    (["--model=digits", "--image-size=16"], r"--image-size of digits is that of its data, \(8, 8\); leave it out"),
    (["--model=DiT-XL2"], "unknown model 'DiT-XL2'. Did you mean 'DiT-XL/2'?"),
    (["--model=DiT-XL/2@500"], "unknown model 'DiT-XL/2@500'. Did you mean 'DiT-XL/2@512'?"),
    (["--model=DiT-S/2", "--precision=bf17"], "precision must be one of .*bf16.* got 'bf17'"),
    (["--model=DiT-S/2", "--batch-size=0"], "--batch-size must be positive, got 0"),
    (["--model=DiT-S/8", "--image-size=72"], "--image-size of DiT-S/8 must be a positive multiple of 64, got 72"),
    (["--batch-size=8", "--image-size=64"], "--batch-size, --image-size: of use only with --model"),
])  # fmt: skip
def test_doctor_refuses_impossible_models(options, message, capsys):
    assert cli.main(["doctor", *options]) == 2
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err)
