"""DiT blocks and final layers. The contract between blocks is the pending residual.

A block carries `(x, branch, gate)`: the residual stream x (B, T, D), the output of the last branch (B, T, D) and its
gate (B, D), whose sum `x + gate * branch` is still to be taken. The next block takes it together with its own LayerNorm
and modulation, which makes one kernel of what are two blocks' ends. `branch=None` means that nothing is pending,
`gate=None` a branch without gate. Modulation is passed in, so that a sampler can compute it ahead of the loop.
`forward(x, c)` is the official form: it settles the pending residual and returns x.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import kernels
from ditfast.kernels.gate_residual_adaln_modulate import norm_again
from ditfast.layers.architecture import MODULATION, Architecture
from ditfast.layers.attention import Attention, CrossAttention, Rope
from ditfast.layers.mlp import Mlp, SwiGlu
from ditfast.layers.norm import Norm
from ditfast.layers.plain import is_plain
from ditfast.layers.recompute import Block
from ditfast.layers.replay import call

NORM_EPS = 1e-6
Pending = tuple[Tensor, Tensor | None, Tensor | None]


def settle(x: Tensor, branch: Tensor | None, gate: Tensor | None) -> Tensor:
    """The residual stream once the pending branch is added."""
    return x if branch is None else kernels.gate_residual(x, branch, gate)


def autocast_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """What autocast has a Linear compute in on x's device, or `otherwise` where there is no autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


def weight_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the module's weight, of a wrapper's first floating-point parameter, or `otherwise` without any."""
    weight = getattr(module, "weight", None)
    weights = [weight] if isinstance(weight, Tensor) else module.parameters()
    return next((w.dtype for w in weights if w.is_floating_point()), otherwise)


def norm_modulate(
    pending: Pending,
    shift: Tensor | None,
    scale: Tensor,
    norm: Norm,
    reader: nn.Module,
    run: Callable[..., Any] = call,
    drop: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """(x, y): the settled stream and its modulated norm, y in the dtype that `reader` computes in.

    Under a recompute policy `run` calls the op, and `drop` says which of x (0) and y (1) need not be kept.
    """
    x, branch, gate = pending
    out_dtype = autocast_dtype(x, weight_dtype(reader, x.dtype))
    if not is_plain(norm, Norm):
        x = settle(*pending)
        y = norm(x) * (1 + scale.unsqueeze(1))
        return x, (y if shift is None else y + shift.unsqueeze(1)).to(out_dtype)
    options = {"eps": norm.form.eps, "norm": norm.form.kind, "out_dtype": out_dtype}
    if branch is None:
        return x, run(partial(_norm_modulate, options), x, shift, scale, norm.weight, drop=(0,))
    op, tensors = partial(_add_norm_modulate, options), (x, branch, gate, shift, scale, norm.weight)
    if run is call or 0 in drop or kernels.backend_of("gate_residual_adaln_modulate", x.device, x.dtype) == "reference":
        return run(op, *tensors, drop=drop)

    added = {"branch": branch.dtype, "gate": None if gate is None else gate.dtype}

    def norm_alone(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """Of a stream that is kept: it is then not written again, nor the branch read."""
        return partial(norm_again, **added, **options), x, shift, scale, norm.weight

    return run(op, *tensors, drop=drop, redo=norm_alone)


def _norm_modulate(options: dict[str, Any], *tensors: Tensor | None) -> Tensor:
    *others, weight = tensors
    return kernels.adaln_modulate(*others, weight=weight, **options)


def _add_norm_modulate(options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    *others, weight = tensors
    return kernels.gate_residual_adaln_modulate(*others, weight=weight, **options)


def norm(x: Tensor, module: nn.LayerNorm, run: Callable[..., Any]) -> Tensor:
    """The LayerNorm of x by `module`, in the dtype that the Linear behind it computes in."""
    if not is_plain(module, nn.LayerNorm):
        return module(x)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return y.to(autocast_dtype(x, y.dtype))

    return run(layer_norm, x, module.weight, module.bias, drop=(0,))


class DiTBlock(Block):
    """Attention and MLP under adaptive norms (DiT, section 3.2), in the forms that the architecture names."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        a, width = architecture, architecture.hidden_size
        self.parts = MODULATION[a.block]
        self.norm1, self.norm2 = Norm(width, a.norm), Norm(width, a.norm)
        self.attn = Attention(width, a.num_heads, a.kv_heads, a.bias, a.qk_norm, a.qk_norm_over)
        self.mlp = SwiGlu(width, a.mlp_width, a.bias) if a.mlp == "swiglu" else Mlp(width, a.mlp_width)
        rows = 2 * len(self.parts) * width
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(a.conditioning_width, rows))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None = None) -> Tensor:
        """x (B, T, D), conditioning c (B, conditioning width), cos and sin of the rotation -> x (B, T, D)."""
        return settle(*self.forward_pending((x, None, None), self.adaLN_modulation(c), rope))

    def forward_pending(self, pending: Pending, modulation: Tensor, rope: Rope | None = None) -> Pending:
        """pending (x, branch, gate) of the block before, modulation (B, 6D or 4D) -> this block's pending residual.

        Under the recompute policy "block" nothing is pending behind it: what it keeps is x alone.
        """
        if self.recompute_now == "block":
            return self.under_policy(self._settled, pending, modulation, rope), None, None
        return self.under_policy(self._pending, pending, modulation, rope)

    def _pending(self, run: Callable[..., Any], pending: Pending, modulation: Tensor, rope: Rope | None) -> Pending:
        chunks, n = modulation.chunk(2 * len(self.parts), dim=1), len(self.parts)
        attn, mlp = (dict(zip(self.parts, half, strict=True)) for half in (chunks[:n], chunks[n:]))
        qkv, first = getattr(self.attn, "qkv", self.attn), getattr(self.mlp, "first", self.mlp)
        # The first x can go, since it follows from what the block before has left; the second is left to the next.
        x, y = norm_modulate(pending, attn.get("shift"), attn["scale"], self.norm1, qkv, run, drop=(0, 1))
        pending = (x, self.attend(y, rope, run), attn.get("gate"))
        x, y = norm_modulate(pending, mlp.get("shift"), mlp["scale"], self.norm2, first, run, drop=(1,))
        return x, self.feed(y, run), mlp.get("gate")

    def _settled(self, run: Callable[..., Any], *args: Any) -> Tensor:
        return settle(*self._pending(run, *args))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches: (B, T, D) -> (B, T, p * p * out_channels)."""

    def __init__(self, architecture: Architecture, out_channels: int):
        super().__init__()
        width = architecture.hidden_size
        self.norm_final = Norm(width, architecture.final_norm)
        self.linear = nn.Linear(width, architecture.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(architecture.conditioning_width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.forward_pending((x, None, None), self.adaLN_modulation(c))

    def forward_pending(self, pending: Pending, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(norm_modulate(pending, shift, scale, self.norm_final, self.linear)[1])


class InContextBlock(Block):
    """A plain ViT block; the conditioning travels in the sequence as two extra tokens."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        hidden_size, num_heads = architecture.hidden_size, architecture.num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = Mlp(hidden_size, architecture.mlp_width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.under_policy(self._forward, x)

    def _forward(self, run: Callable[..., Any], x: Tensor) -> Tensor:
        x = kernels.gate_residual(x, self.attn(norm(x, self.norm1, run)), None)
        return kernels.gate_residual(x, self.feed(norm(x, self.norm2, run), run), None)


class CrossAttentionBlock(Block):
    """A ViT block with cross-attention to the conditioning tokens context (B, 2, D) after its self-attention."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        hidden_size, num_heads = architecture.hidden_size, architecture.num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm3 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = Mlp(hidden_size, architecture.mlp_width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.under_policy(self._forward, x, context)

    def _forward(self, run: Callable[..., Any], x: Tensor, context: Tensor) -> Tensor:
        x = kernels.gate_residual(x, self.attn(norm(x, self.norm1, run)), None)
        x = kernels.gate_residual(x, self.cross_attn(norm(x, self.norm2, run), context), None)
        return kernels.gate_residual(x, self.feed(norm(x, self.norm3, run), run), None)


class PlainFinalLayer(nn.Module):
    """LayerNorm and the projection to patches, for the block variants without adaptive norms."""

    def __init__(self, architecture: Architecture, out_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(architecture.hidden_size, eps=NORM_EPS)
        self.linear = nn.Linear(architecture.hidden_size, architecture.patch_size**2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))
