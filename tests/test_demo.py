"""The demo's parts on a short run, its judge on known inputs, and (with `full`) its quality bar."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.config import parse_config
from ditfast.data import Digits
from ditfast.demo import demo, judge


def scans(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = Digits(split)
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def test_judge_passes_unseen_real_digits():
    judged = judge(*scans("heldout"))
    assert judged.passed and judged.accuracy == judged.classifier > 0.97
    assert judged.sample_distance == judged.heldout_distance > 5


def test_judge_sees_copies():
    images, labels = scans("train")
    assert judge(images[:400], labels[:400]).sample_distance == 0


def test_judge_fails_wrong_classes_and_noise():
    images, labels = scans("heldout")
    assert judge(images, (labels + 1) % 10).accuracy < 0.05
    swapped = torch.where(labels == 3, 8, torch.where(labels == 8, 3, labels))
    judged = judge(images, swapped)
    assert not judged.passed and judged.accuracy > 0.7
    assert not judge(torch.randn_like(images), labels).passed


@pytest.mark.parametrize("preset, samplers", [("digits", ["DDIM"]), ("digits-sit", ["ODE", "SDE"])])
def test_short_run_writes_everything(preset, samplers, tmp_path):
    out = tmp_path / "demo"
    options = [
        f"--out={out}", "--train.steps=4", "--train.log_every=2", "--train.tensorboard=false", "--train.sample_every=0",
        "--optim.warmup_steps=0", "--model.hidden_size=32", "--model.num_heads=2", "--sample.steps=4",
    ]  # fmt: skip
    assert demo(parse_config(options, preset)) is False
    written = np.load(out / "samples.npz")
    count = len(samplers)
    assert written["arr_0"].shape == (400 * count, 8, 8, 1) and written["arr_0"].dtype == np.uint8
    assert np.bincount(written["labels"]).tolist() == [40 * count] * 10
    assert Image.open(out / "grid.png").size == (20 * 34 * count + 2, 20 * 34 + 2)
    for name in ("grid.png", "loss.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
    report = (out / "report.md").read_text()
    assert "FAILED" in report and [name for name in ("DDIM", "ODE", "SDE") if f"- {name}: " in report] == samplers
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [2, 4]


@pytest.mark.full
@pytest.mark.parametrize("preset", ["digits", "digits-sit"])
def test_demo_meets_its_bar(preset, tmp_path):
    assert demo(parse_config([f"--out={tmp_path}"], preset))
