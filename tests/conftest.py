"""Shared by all tests: the interpreter for Triton where there is no GPU, the tiny model and its golden outputs."""

import os
from pathlib import Path

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
