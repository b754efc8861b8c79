"""Trainers to measure: their weights are not zero and stay, and nothing is left on disk."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.training import TINY, model_config, process_of, random_batch, run_config, trainer_for, write_features
from ditfast.config import ConfigError, parse_config
from ditfast.data import FeatureFolder
from ditfast.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
def test_weights_are_not_zero_and_steps_leave_them(precision):
    with trainer_for(TINY, 2, precision, ALONE) as trainer:
        before = {name: p.detach().clone() for name, p in trainer.optimizer.parameters.items()}
        assert all(p.any() for p in before.values())
        trainer.learn(*random_batch(TINY, 2, CPU))
        assert trainer.last_norm == 0.0, "of no step of the run's own"
        assert all(torch.equal(p, before[name]) for name, p in trainer.optimizer.parameters.items())
        assert any(m.any() for m in trainer.optimizer.moments["exp_avg"].values())
        folder = Path(trainer.config.out)
        assert folder.exists()
    assert not folder.parent.exists()


def test_features_are_read_as_they_were_drawn(tmp_path):
    dataset = FeatureFolder(write_features(tmp_path / "data", 3, TINY), num_classes=10)
    assert len(dataset) == 3 and dataset.image_size == TINY.input_size
    assert len({float(x.sum()) for x, _ in map(dataset.__getitem__, range(3))}) == 3


@pytest.mark.parametrize(
    "preset", ["DiT-XL/2", "DiT-S/8@512", "SiT-XL/2@512", "LightningDiT-XL/1", "LargeDiT-3B/2", "LargeDiT-tiny/2"]
)
def test_published_models_are_the_presets(preset):
    name, _, pixels = preset.partition("@")
    expected = parse_config(["--preset", preset])
    found = run_config(name, int(pixels or 256))
    assert (found.model, found.transport, found.process) == (expected.model, expected.transport, expected.process)
    assert model_config(name, int(pixels or 256)) == found.model and process_of(found.model) == found.process


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ConfigError, match="unknown model 'SiT-XL2'. Did you mean 'SiT-XL/2'"):
        model_config("SiT-XL2")


def test_a_tiny_one_is_of_its_family():
    tiny, whole = model_config("tiny LightningDiT-XL/1", 64), model_config("LightningDiT-XL/1", 64)
    assert tiny.input_size == (4, 4) and tiny.in_channels == 32 and tiny.norm == whole.norm and tiny.mlp == "swiglu"
    assert replace(tiny, hidden_size=1152, depth=28, num_heads=16, num_classes=1000) == whole
    assert (tiny.hidden_size, tiny.depth, tiny.num_heads, tiny.num_classes) == (64, 2, 2, 10)


def test_a_size_of_fewer_layers_is_the_size_otherwise():
    few, whole = model_config("DiT-S/2 of 2 layers", 128), model_config("DiT-S/2", 128)
    assert few == replace(whole, depth=2) and whole.depth == 12


def test_a_batch_is_what_learn_takes():
    x, y, t, weights, noise, drop = random_batch(TINY, 40, CPU)
    assert x.shape == noise.shape == (40, 4, 8, 8) and not torch.equal(x, noise)
    assert int(y.min()) >= 0 and int(y.max()) < 10 and int(t.max()) < 1000
    assert torch.equal(weights, torch.ones(40)) and 0 < int(drop.sum()) < 20
    assert torch.equal(x, random_batch(TINY, 40, CPU)[0]) and not torch.equal(x, random_batch(TINY, 40, CPU, 1)[0])


def test_times_of_a_sit_are_in_0_to_1():
    model = model_config("tiny SiT-S/2", 64)
    t = random_batch(model, 40, CPU)[2]
    assert t.is_floating_point() and 0 <= t.min() < 0.2 and 0.8 < t.max() < 1


def test_a_sit_is_trained_by_its_process():
    run = run_config("tiny LightningDiT-XL/1", 64)
    with trainer_for(run.model, 2, "fp32", ALONE, transport=run.transport) as trainer:
        assert trainer.config.process == "sit" and trainer.process.use_cosine_loss
        assert trainer.learn(*random_batch(run.model, 2, CPU))[0]["loss"].shape == (2,)


def test_a_trainer_is_gone_when_the_next_is_made():
    gc.disable()
    try:
        with trainer_for(TINY, 2, "fp32", ALONE) as first:
            weight = weakref.ref(first.optimizer.masters["blocks.0.mlp.fc1.weight"])
        del first
        assert weight() is not None, "it refers to itself"
        with trainer_for(TINY, 2, "fp32", ALONE):
            assert weight() is None
    finally:
        gc.enable()
