"""Trainers to measure: their weights are not zero and stay, and nothing is left on disk."""

import gc
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.training import TINY, model_config, random_batch, trainer_for, write_features
from ditfast.config import preset
from ditfast.data import FeatureFolder
from ditfast.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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


@pytest.mark.parametrize(("name", "pixels"), [("DiT-XL/2", 256), ("DiT-S/8", 512)])
def test_published_sizes_are_the_presets(name, pixels):
    expected = preset(name + ("" if pixels == 256 else f"@{pixels}"))
    config = asdict(model_config(name, pixels))
    assert {key: config[key.removeprefix("model.")] for key in expected if key.startswith("model.")} == {
        key: value for key, value in expected.items() if key.startswith("model.")
    }


def test_a_size_of_fewer_layers_is_the_size_otherwise():
    few, whole = model_config("DiT-S/2 of 2 layers", 128), model_config("DiT-S/2", 128)
    assert few == replace(whole, depth=2) and whole.depth == 12


def test_a_batch_is_what_learn_takes():
    x, y, t, weights, noise, drop = random_batch(TINY, 40, CPU)
    assert x.shape == noise.shape == (40, 4, 8, 8) and not torch.equal(x, noise)
    assert int(y.min()) >= 0 and int(y.max()) < 10 and int(t.max()) < 1000
    assert torch.equal(weights, torch.ones(40)) and 0 < int(drop.sum()) < 20
    assert torch.equal(x, random_batch(TINY, 40, CPU)[0]) and not torch.equal(x, random_batch(TINY, 40, CPU, 1)[0])


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
