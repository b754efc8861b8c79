"""Small models for the tests of layers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ditfast.layers import DiT


@pytest.fixture
def randomized() -> Callable[..., DiT]:
    """make(**options): a small model none of whose weights is zero, in evaluation."""

    def make(**options) -> DiT:
        arguments = {"input_size": 8, "in_channels": 3, "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
        torch.manual_seed(0)
        model = DiT(**arguments | options)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """make(model, n=5): (x, t, y) that the model takes, always the same."""

    def make(model: DiT, n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, model.in_channels, *model.x_embedder.img_size, generator=generator)
        t = torch.randint(0, 1000, (n,), generator=generator)
        return x, t, torch.randint(0, model.y_embedder.num_classes, (n,), generator=generator)

    return make
