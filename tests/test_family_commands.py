"""LightningDiT and LargeDiT through the commands: a trained run exported and drawn from, and a file on its own."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import cli
from ditfast.config import PRESETS
from ditfast.layers import LargeDiT, LargeDiT_models, LightningDiT, LightningDiT_models, NormForm
from ditfast.presets import PUBLISHED, published
from ditfast.sample import open_weights
from ditfast.train import train
from tests.test_sit import SIT

RMS = NormForm("rms", weight=True)
FAMILIES = {
    "LightningDiT": SIT | {
        "model.mlp": "swiglu", "model.position": ("sincos", "rope_2d"), "model.norm": RMS, "model.final_norm": RMS,
        "model.qk_norm": RMS, "transport.timestep_sampler": "lognormal", "transport.cosine_loss": True,
    },
    "LargeDiT": {
        "model.mlp": "swiglu", "model.mlp_multiple": 16, "model.position": ("rope_1d",), "model.bias": False,
        "model.norm": RMS, "model.kv_heads": 1, "model.conditioning_limit": 16,
        "model.qk_norm": NormForm("layer", 1e-5, weight=True, bias=True), "model.qk_norm_over": "width",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def drawn(weights, out, *options):
    """What `ditfast sample` writes for two samples in two steps: images, or latents."""
    given = [str(weights), f"--out={out}", "--count=2", "--steps=2", "--device=cpu", "--precision=fp32", *options]
    assert cli.main(["sample", *given]) == 0
    assert Image.open(out / "grid.png").height > 32
    latents = out / "latents.npy"
    return np.load(latents) if latents.exists() else np.load(out / "samples.npz")["arr_0"]


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_a_run_and_its_export_draw_the_same(options, tiny_run, tmp_path):
    made = tiny_run(overrides={"train.steps": 2, "optim.lr": 1e-2} | options)
    train(made)
    file = tmp_path / "exported.safetensors"
    assert cli.main(["export", made.out, str(file)]) == 0
    images = drawn(made.out, tmp_path / "run")
    assert images.shape == (2, 8, 8, 1) and images.std() > 1
    assert np.array_equal(drawn(file, tmp_path / "file", f"--config={Path(made.out) / 'config.yaml'}"), images)


@pytest.fixture
def tiny_lightning(monkeypatch):
    """A LightningDiT-tiny/1 among the published models, the smallest of which has 130 million parameters."""
    name, make = "LightningDiT-tiny/1", partial(LightningDiT, depth=2, hidden_size=32, num_heads=2, patch_size=1)
    monkeypatch.setitem(LightningDiT_models, name, make)
    monkeypatch.setitem(PUBLISHED, name, make)
    monkeypatch.setitem(PRESETS, name, partial(published, name, 256))
    return make


LARGE = LargeDiT_models["LargeDiT-tiny/2"]


class TestFileAlone:
    def write(self, model, path):
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        torch.save(model.state_dict(), path)

    OPTIONS = [{}, {"use_qknorm": True, "input_size": 8, "in_channels": 4}, {"use_rope": False}]

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_of_a_lightning_dit(self, options, tiny_lightning, tmp_path):
        model, file = tiny_lightning(num_classes=7, **options), tmp_path / "w.pt"
        self.write(model, file)
        side, channels = options.get("input_size", 16), options.get("in_channels", 32)
        assert open_weights(file).config.model.architecture == model.architecture
        assert drawn(file, tmp_path / "out").shape == (2, channels, side, side)

    @pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4, "qk_norm": False}], ids=str)
    def test_of_a_large_dit(self, options, tmp_path):
        model, file = LARGE(**options), tmp_path / "w.pt"
        self.write(model, file)
        config = open_weights(file).config
        heads = options.get("num_kv_heads", 2)
        assert (config.process, config.model.kv_heads, config.model.qk_norm) == (
            "ddpm",
            heads,
            model.architecture.qk_norm,
        )
        assert drawn(file, tmp_path / "out").shape == (2, 4, 32, 32)

    def test_of_a_large_dit_that_is_a_sit(self, tmp_path):
        self.write(LARGE(), tmp_path / "w.pt")
        latents = drawn(tmp_path / "w.pt", tmp_path / "out", "--process=sit", "--sampler=ode")
        assert latents.shape == (2, 4, 32, 32)

    def test_of_no_published_size(self, tmp_path, capsys):
        self.write(LargeDiT(8, 2, 4, 32, 1, 2, num_kv_heads=1, multiple_of=16), tmp_path / "w.pt")
        assert cli.main(["sample", str(tmp_path / "w.pt")]) == 2
        assert "--config runs/.../config.yaml, or a YAML file that says its `model:`" in capsys.readouterr().err
        (tmp_path / "mine.yaml").write_text(
            "preset: LargeDiT-tiny/2\nmodel: {hidden_size: 32, depth: 1, num_heads: 2, kv_heads: 1}\n"
            "train: {recompute: none}\n"
        )
        assert drawn(tmp_path / "w.pt", tmp_path / "out", f"--config={tmp_path / 'mine.yaml'}").shape == (2, 4, 32, 32)
