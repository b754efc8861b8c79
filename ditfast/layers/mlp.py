"""The DiT feed-forward: Linear, tanh-GELU, Linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.plain import is_plain


class Mlp(nn.Module):
    """x (B, T, D) -> (B, T, D), D * `ratio` wide inside."""

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        width = int(hidden_size * ratio)
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)):
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return kernels.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
