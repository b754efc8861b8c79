"""The parts of the official DiT and SiT, timm's Attention and Mlp among them, on ditfast's ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.acceleration.swap import (
    Form,
    compute_dtype,
    described,
    idle_problem,
    inputs_of,
    linear_problem,
    norm_problem,
    on,
)
from ditfast.layers.plain import is_plain


def _matching(x: Tensor, c: Tensor) -> bool:
    """Whether x is (B, T, D) and the conditioning (B, D'), not something that broadcasts."""
    return x.ndim == 3 and c.ndim == 2 and len(x) == len(c)


def _tokens_and_conditioning(width: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # A small variance, so that an eps shows in the result of a norm.
    return (0.05 * torch.randn(2, 3, width), torch.randn(2, width)), {}


class BlockForm(Form):
    """DiTBlock, SiTBlock: forward(x, c)."""

    what = "DiT or SiT block"
    ops = ("adaln_modulate", "gate_residual_adaln_modulate", "gate_residual")
    required = frozenset({"norm1", "attn", "norm2", "mlp", "adaLN_modulation"})
    is_block = True

    @staticmethod
    def unfit(module: Any) -> str | None:
        return norm_problem(module, "norm1") or norm_problem(module, "norm2")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _tokens_and_conditioning(module.norm1.normalized_shape[-1])

    @staticmethod
    def forward(module: Any, x: Tensor, c: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or not _matching(x, c):
            return NotImplemented
        shift_msa, scale_msa, *modulation = module.adaLN_modulation(c).chunk(6, dim=1)
        dtype, backend = compute_dtype(x, scale_msa), on(module, "adaln_modulate")
        y = kernels.adaln_modulate(x, shift_msa, scale_msa, module.norm1.eps, out_dtype=dtype, backend=backend)
        return second_half(module, x, module.attn(y), modulation, module.norm2.eps, module.mlp)


def second_half(
    module: nn.Module, x: Tensor, branch: Tensor, modulation: Sequence[Tensor], eps: float, mlp: nn.Module
) -> Tensor:
    """A block from the end of its attention on: gated residual, modulated norm, `mlp`, gated residual.

    modulation: the attention's gate, the MLP's shift, scale and gate.
    """
    gate_msa, shift, scale, gate_mlp = modulation
    x = _wide_enough(x, branch, gate_msa)
    dtype, backend = compute_dtype(x, scale), on(module, "gate_residual_adaln_modulate")
    x, y = kernels.gate_residual_adaln_modulate(
        x, branch, gate_msa, shift, scale, eps, out_dtype=dtype, backend=backend
    )
    branch = mlp(y)
    return kernels.gate_residual(
        _wide_enough(x, branch, gate_mlp), branch, gate_mlp, backend=on(module, "gate_residual")
    )


def _wide_enough(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x in the dtype that PyTorch's x + gate * branch has."""
    return x.to(torch.promote_types(x.dtype, torch.promote_types(branch.dtype, gate.dtype)))


class FinalLayerForm(Form):
    """FinalLayer: forward(x, c)."""

    what = "final layer"
    ops = ("adaln_modulate",)
    required = frozenset({"norm_final", "linear", "adaLN_modulation"})

    @staticmethod
    def unfit(module: Any) -> str | None:
        return norm_problem(module, "norm_final")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _tokens_and_conditioning(module.norm_final.normalized_shape[-1])

    @staticmethod
    def forward(module: Any, x: Tensor, c: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or not _matching(x, c):
            return NotImplemented
        shift, scale = module.adaLN_modulation(c).chunk(2, dim=1)
        dtype, backend = compute_dtype(x, scale), on(module, "adaln_modulate")
        y = kernels.adaln_modulate(x, shift, scale, module.norm_final.eps, out_dtype=dtype, backend=backend)
        return module.linear(y)


class AttentionForm(Form):
    """timm's Attention: forward(x), without mask."""

    what = "attention"
    ops = ("attention_qkvpacked",)
    required = frozenset({"qkv", "proj"})
    allowed = frozenset({"q_norm", "k_norm", "norm", "attn_drop", "proj_drop"})

    @staticmethod
    def unfit(module: Any) -> str | None:
        return idle_problem(module, "q_norm", "k_norm", "attn_drop", "norm", "proj_drop")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(2, 3, inputs_of(module.qkv)),), {}

    @staticmethod
    def forward(module: Any, x: Tensor, *more: Any, **named: Any) -> Any:
        if x.ndim != 3 or any(value is not None and value is not False for value in (*more, *named.values())):
            return NotImplemented
        qkv = module.qkv(x).unflatten(2, (3, module.num_heads, -1))
        backend = on(module, "attention_qkvpacked")
        return module.proj(kernels.attention_qkvpacked(qkv, scale=module.scale, backend=backend).flatten(2))


class MlpForm(Form):
    """timm's Mlp with tanh-GELU: forward(x)."""

    what = "MLP"
    ops = ("gelu_mlp",)
    required = frozenset({"fc1", "act", "fc2"})
    allowed = frozenset({"drop", "drop1", "drop2", "norm"})

    @staticmethod
    def unfit(module: Any) -> str | None:
        if not (is_plain(module.act, nn.GELU) and module.act.approximate == "tanh"):
            return f"act is {described(module.act)}, expected a bare GELU(approximate='tanh')"
        return (
            linear_problem("fc1", module.fc1)
            or linear_problem("fc2", module.fc2)
            or idle_problem(module, "drop", "drop1", "norm", "drop2")
        )

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(2, 3, module.fc1.in_features),), {}

    @staticmethod
    def forward(module: Any, x: Tensor, *more: Any, **named: Any) -> Any:
        if more or named:
            return NotImplemented
        fc1, fc2 = module.fc1, module.fc2
        return kernels.gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, backend=on(module, "gelu_mlp"))


class TimestepEmbedderForm(Form):
    """TimestepEmbedder: forward(t)."""

    what = "timestep embedder"
    ops = ("timestep_embedding",)
    required = frozenset({"mlp"})
    dtype = torch.float32  # the official sinusoid is fp32 whatever the weights are

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        return super().is_kind(module) and hasattr(module, "frequency_embedding_size")

    @staticmethod
    def unfit(module: Any) -> str | None:
        return linear_problem("mlp.0", module.mlp[0])

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Small angles, which fp32 holds to more digits than those of a timestep of 999.
        return (torch.tensor([0.25, 7.0]),), {}

    @staticmethod
    def forward(module: Any, t: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or t.ndim != 1:
            return NotImplemented
        size, dtype = module.frequency_embedding_size, module.mlp[0].weight.dtype
        backend = on(module, "timestep_embedding")
        return module.mlp(kernels.timestep_embedding(t, size, out_dtype=dtype, backend=backend))


FORMS: tuple[type[Form], ...] = (BlockForm, FinalLayerForm, AttentionForm, MlpForm, TimestepEmbedderForm)
