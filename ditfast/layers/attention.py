"""Multi-head attention over packed qkv, and cross-attention to a short context."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.architecture import NormForm, check_heads
from ditfast.layers.norm import Norm
from ditfast.layers.plain import is_plain
from ditfast.layers.replay import call

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Self-attention: x (B, T, D) -> (B, T, D). The rows of qkv's weight are q | k | v, heads-major inside each.

    kv_heads: heads of k and v, each for num_heads / kv_heads heads of q (arXiv:2305.13245); None: num_heads.
    qk_norm: the norm of q and k, per head, or over all their channels with qk_norm_over="width".
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_heads: int | None = None,
        bias: bool = True,
        qk_norm: NormForm | None = None,
        qk_norm_over: str = "head",
    ):
        super().__init__()
        check_heads(hidden_size, num_heads, kv_heads)
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads or num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * self.kv_heads) * self.head_dim, bias)
        self.proj = nn.Linear(hidden_size, hidden_size, bias)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.over_width = qk_norm_over == "width"
        if qk_norm is not None:
            widths = (
                (num_heads * self.head_dim, self.kv_heads * self.head_dim) if self.over_width else 2 * (self.head_dim,)
            )
            self.q_norm, self.k_norm = (Norm(width, qk_norm) for width in widths)

    def forward(self, x: Tensor, rope: Rope | None = None, run: Callable[..., Any] = call) -> Tensor:
        """rope: cos and sin (T, head_dim / 2). `run` is what a block under a recompute policy has its ops called by."""
        qkv = self.qkv(x).unflatten(2, (-1, self.head_dim))
        if rope is not None or self.q_norm is not None:
            weights: list[Tensor | None] = [None] * 4
            form: NormForm | None = None
            norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
            if all(is_plain(norm, Norm) for norm in norms):
                weights = [getattr(norm, name) for name in ("weight", "bias") for norm in norms] or weights
                form = norms[0].form if norms else None
            else:
                qkv = self._normed_by_modules(qkv, *norms)
            qkv = run(partial(self._prepare, rope, form), qkv, *weights, drop=(0,))
        return self.proj(kernels.attention_qkvpacked(qkv, num_heads=self.num_heads).flatten(2))

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split((self.num_heads, self.kv_heads, self.kv_heads), 2)

    def _prepare(self, rope: Rope | None, norm: NormForm | None, qkv: Tensor, *weights: Tensor | None) -> Tensor:
        """qkv (B, T, N, head_dim), normed and rotated."""
        if norm is not None or rope is not None:
            over = "width" if self.over_width else "head"
            options = {"norm": norm.kind, "eps": norm.eps, "over": over} if norm else {}
            qkv = kernels.qk_norm_rope(qkv, *weights, *(rope or ()), num_heads=self.num_heads, **options)
        return qkv

    def _normed_by_modules(self, qkv: Tensor, *norms: nn.Module) -> Tensor:
        q, k, v = self._split(qkv)
        pairs = zip(norms, (q, k), strict=True)
        if self.over_width:
            return torch.cat([*(norm(x.flatten(2)).view_as(x) for norm, x in pairs), v], 2)
        return torch.cat([*(norm(x) for norm, x in pairs), v], 2)


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
