"""Equal seeds give equal bits, different seeds do not, and a run leaves the process as it found it."""

import random

import numpy
import pytest
import torch

from ditfast import checkpoint
from ditfast.reproducibility import (
    deterministic_algorithms,
    generator_for,
    restore_rng,
    rng_tensors,
    seed_everything,
)
from ditfast.train import train


def final(config):
    train(config)
    return checkpoint.load(config.out).tensors


def same(ours, theirs):
    return all(
        torch.equal(value, theirs[group][name]) for group, named in ours.items() for name, value in named.items()
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_bit_identical(deterministic, tiny_run):
    options = {"deterministic": deterministic, "train.steps": 3}
    assert same(final(tiny_run("first", options)), final(tiny_run("second", options)))


def test_another_seed_is_another_run(tiny_run):
    ours, theirs = (final(tiny_run(f"seed{seed}", {"seed": seed, "train.steps": 1}))["model"] for seed in (0, 1))
    drawn = [name for name in ours if name.endswith("weight") and "adaLN" not in name and "final" not in name]
    assert not any(torch.equal(ours[name], theirs[name]) for name in drawn)


@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_mode_ends_with_the_run(fails, tiny_run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ditfast.train.save_config", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    config = tiny_run(overrides={"deterministic": True, "train.steps": 1})
    if fails:
        monkeypatch.setattr("ditfast.train.Trainer.step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    else:
        train(config)
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_of_the_caller_is_kept():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with deterministic_algorithms(True):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_seeding_covers_all_global_generators():
    draws = []
    for _ in range(2):
        seed_everything(2**40 + 3)
        draws.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


class TestGeneratorFor:
    def test_is_a_function_of_its_arguments(self):
        assert torch.equal(*(torch.rand(9, generator=generator_for(5, "noise", 7)) for _ in range(2)))

    @pytest.mark.parametrize("other", [(6, "noise", 7), (5, "sample", 7), (5, "noise", 8), (5 + 2**32, "noise", 7)])
    def test_each_argument_counts(self, other):
        ours, theirs = generator_for(5, "noise", 7), generator_for(*other)
        assert not torch.equal(torch.rand(9, generator=ours), torch.rand(9, generator=theirs))

    def test_global_state_is_untouched(self):
        before = torch.get_rng_state()
        torch.rand(9, generator=generator_for(5, "noise", 7))
        assert torch.equal(torch.get_rng_state(), before)


def test_rng_round_trip():
    states = rng_tensors(torch.device("cpu"))
    expected = torch.rand(5)
    restore_rng(states, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
