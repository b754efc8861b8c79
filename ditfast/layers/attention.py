"""Multi-head attention over packed qkv, and cross-attention to a short context."""

from torch import Tensor, nn

from ditfast import kernels


def check_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} must be divisible by num_heads {num_heads}")


class Attention(nn.Module):
    """Self-attention: x (B, T, D) -> (B, T, D). The rows of qkv's weight are q | k | v, heads-major inside each."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        check_heads(hidden_size, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        return self.proj(kernels.attention_qkvpacked(qkv).flatten(2))


class CrossAttention(nn.Module):
    """Attention from x (B, T, D) to context (B, S, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        check_heads(hidden_size, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1))
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return self.proj(kernels.attention(q, k, v).flatten(2))
