"""The DiT feed-forward: Linear, tanh-GELU, Linear."""

from torch import Tensor, nn

from ditfast import kernels


class Mlp(nn.Module):
    """x (B, T, D) -> (B, T, D), D * `ratio` wide inside."""

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        width = int(hidden_size * ratio)
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
