"""Shared by all tests: the interpreter for Triton where there is no GPU, the tiny model and its golden outputs."""

import dataclasses
import logging
import os
import random
from pathlib import Path

import numpy
import torch

# Before anything imports triton.jit: on a machine without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
TINY = {"input_size": 8, "patch_size": 2, "depth": 2, "hidden_size": 144, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Float64 outputs of the official DiT on random fp32 weights (`state/...`) and inputs (`in/...`)."""
    return load_file(GOLDEN / "dit_tiny.safetensors")


@pytest.fixture(scope="session")
def golden_state(golden) -> dict[str, torch.Tensor]:
    return {name.removeprefix("state/"): value for name, value in golden.items() if name.startswith("state/")}


@pytest.fixture
def tiny() -> dict:
    """Constructor arguments of the golden model."""
    return dict(TINY)


@pytest.fixture(autouse=True)
def global_state_is_restored():
    """No test leaves a seed, a deterministic mode or the command's log handlers to the next."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    log = logging.getLogger("ditfast")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    log.handlers, log.level, log.propagate = handlers, level, propagate


TINY_RUN = {
    "device": "cpu",
    "model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "model.patch_size": 2,
    "diffusion.noise_schedule": "squaredcos_cap_v2", "optim.lr": 3e-3, "optim.ema_rates": [0.9],
    "train.steps": 8, "train.batch_size": 16, "train.precision": "fp32", "train.tensorboard": False,
    "train.log_every": 2, "train.save_every": 3, "train.keep": 9,
    "sample.sampler": "ddim", "sample.steps": 4, "sample.guidance_channels": None, "sample.clip_denoised": True,
}  # fmt: skip


@pytest.fixture
def tiny_run(tmp_path):
    """make(name="run", {"train.steps": 4, ...}) -> RunConfig of a run on digits that takes about a second."""
    # Threads gain nothing on a model this small, and the test processes of one machine would fight for its cores.
    torch.set_num_threads(1)

    def make(name: str = "run", overrides: dict | None = None):
        from ditfast import config

        sections: dict = {"out": str(tmp_path / name)}
        for key, value in (TINY_RUN | (overrides or {})).items():
            section, _, option = key.rpartition(".")
            (sections.setdefault(section, {}) if section else sections)[option] = value
        types = {f.name: f.type for f in dataclasses.fields(config.RunConfig)}
        return config.RunConfig(**{k: types[k](**v) if isinstance(v, dict) else v for k, v in sections.items()})

    return make
