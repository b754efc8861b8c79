"""The feed-forwards: Linear, tanh-GELU, Linear of DiT, and the SwiGLU of LightningDiT and LargeDiT."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.plain import is_plain
from ditfast.layers.replay import call


class FeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D) through two linears; with `recompute`, the first is computed again in backward.

    A subclass names its linears, what is between them, and the op that is all of it.
    """

    recompute = False
    op: str
    names: tuple[str, str]

    @property
    def first(self) -> nn.Module:
        return getattr(self, self.names[0])

    @property
    def last(self) -> nn.Module:
        return getattr(self, self.names[1])

    def between(self, hidden: Tensor) -> Tensor:
        """What the second linear gets of the first one's result."""
        raise NotImplementedError

    def fused(self, x: Tensor, recompute: bool) -> Tensor:
        """The op, of the linears' weights."""
        raise NotImplementedError

    @property
    def plain(self) -> bool:
        """Whether weights may be read without calling the linears."""
        return is_plain(self.first, nn.Linear) and is_plain(self.last, nn.Linear)

    def forward(self, x: Tensor, run: Callable[..., Any] = call) -> Tensor:
        """`run` is what a block under a recompute policy has its ops called by."""
        if not self.plain:
            return self.last(run(self.between, self.first(x), drop=(0,)))
        if kernels.backend_of(self.op, x.device, x.dtype) != "reference":
            return self.fused(x, self.recompute)
        # The reference keeps the activation's output; replayed it is the same arithmetic.
        # Weights used twice under one autocast would otherwise share a copy, and gradients be added in its dtype.
        kind = x.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            if not self.recompute:
                return self.last(run(self.between, self.first(x), drop=(0,)))
            redone = lambda *args: self.between(F.linear(*args))  # noqa: E731
            return self.last(run(redone, x, self.first.weight, self.first.bias, drop=(0,)))


class Mlp(FeedForward):
    """fc2(gelu(fc1(x))) with the tanh approximation, `width` wide inside."""

    op, names = "gelu_mlp", ("fc1", "fc2")

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def between(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden, approximate="tanh")

    def fused(self, x: Tensor, recompute: bool) -> Tensor:
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return kernels.gelu_mlp(x, *weights, recompute=recompute)


class SwiGlu(FeedForward):
    """w3(silu(gate) * value), gate and value (each `width` wide) the halves of w12(x) (arXiv:2002.05202)."""

    op, names = "swiglu_mlp", ("w12", "w3")

    def __init__(self, hidden_size: int, width: int, bias: bool = True):
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * width, bias)
        self.w3 = nn.Linear(width, hidden_size, bias)

    def between(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, -1)
        return F.silu(gate) * value

    def fused(self, x: Tensor, recompute: bool) -> Tensor:
        biases = (None, None) if self.w12.bias is None else self.w12.bias.chunk(2)
        weights = (*self.w12.weight.chunk(2), self.w3.weight, *biases, self.w3.bias)
        return kernels.swiglu_mlp(x, *weights, recompute=recompute)
