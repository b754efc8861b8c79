"""Seeds, deterministic algorithms, and randomness that depends on (seed, purpose, number) alone."""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

from ditfast.kernels.autotune import using_tuned


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch, which decide a new model's weights."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Where `enabled`, forbids PyTorch's nondeterministic kernels for the block's duration."""
    if not enabled:
        yield
        return
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this when its first handle is made; without it PyTorch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextmanager
def measured_configs(path: str | None) -> Iterator[None]:
    """Where a file is named, runs the block under its measured configs of the kernels. ValueError for a bad file."""
    if path is None:
        yield
        return
    with using_tuned(path):
        yield


def generator_for(seed: int, purpose: str, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of its arguments: a resumed run draws what the uninterrupted one did.

    `number` counts steps or samples; `purpose` keeps streams of one number apart.
    """
    # Hashed, since torch's CPU generator reads the low 32 bits of a seed only.
    digest = hashlib.sha256(f"ditfast {purpose} {seed} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's global generators, as tensors to checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets the global generators to what `rng_tensors` returned; one that a CPU run did not save stays as it is."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
