"""The DiT feed-forward: Linear, tanh-GELU, Linear."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.plain import is_plain
from ditfast.layers.replay import call

_gelu = partial(F.gelu, approximate="tanh")


class Mlp(nn.Module):
    """x (B, T, D) -> (B, T, D), D * `ratio` wide inside; with `recompute`, fc1 is computed again in backward."""

    recompute = False

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        width = int(hidden_size * ratio)
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor, run: Callable[..., Any] = call) -> Tensor:
        """`run` is what a block under a recompute policy has its ops called by."""
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)):
            return self.fc2(run(_gelu, self.fc1(x), drop=(0,)))
        fused = kernels.backend_of("gelu_mlp", x.device, x.dtype) != "reference"
        if fused or run is call:
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return kernels.gelu_mlp(x, *weights, recompute=self.recompute and fused)
        # The reference keeps GELU's output; replayed it is the same arithmetic.
        # Weights used twice under one autocast would otherwise share a copy, and gradients be added in its dtype.
        kind = x.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            if not self.recompute:
                return self.fc2(run(_gelu, self.fc1(x), drop=(0,)))
            return self.fc2(run(lambda *args: _gelu(F.linear(*args)), x, self.fc1.weight, self.fc1.bias, drop=(0,)))
