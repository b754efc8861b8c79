"""attention and qk_norm_rope by other people's kernels; the attention libraries that are backends are not here."""

from collections.abc import Callable
from typing import Any

import torch

from ._base import FLASH_ATTN, LIGER, TRANSFORMER_ENGINE, PeerError, importing, require_one_dtype
from .norms import liger_norm

Norm = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, str], torch.Tensor]
Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def transformer_engine_attention(**inputs: Any) -> torch.Tensor:
    """attention by Transformer Engine's DotProductAttention, its own choice of kernel."""
    with importing(TRANSFORMER_ENGINE, inputs["q"].device):
        from transformer_engine.pytorch import DotProductAttention
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    require_one_dtype("Transformer Engine", inputs, torch.bfloat16, torch.float16)
    attention = DotProductAttention(
        num_attention_heads=q.shape[2],
        kv_channels=q.shape[3],
        num_gqa_groups=k.shape[2],
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="no_mask",
        softmax_scale=inputs.get("scale"),
    )
    return attention(q, k, v).view(q.shape)


def transformer_engine_qkvpacked(**inputs: Any) -> torch.Tensor:
    """attention_qkvpacked by the same, of views into the packed tensor."""
    q, k, v = _split(inputs["qkv"], inputs["num_heads"])
    return transformer_engine_attention(q=q, k=k, v=v, scale=inputs.get("scale"))


def _split(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    kv_heads = (qkv.shape[2] - heads) // 2
    return qkv.split((heads, kv_heads, kv_heads), 2)


def liger_qk_norm_rope(**inputs: Any) -> torch.Tensor:
    """qk_norm_rope by Liger's norms and its rotation of halves."""
    with importing(LIGER, inputs["qkv"].device):
        from liger_kernel.ops.rope import LigerRopeFunction

    def rotation(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        # It wants heads before tokens, and its tables for both halves.
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        rotated = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(each.transpose(1, 2) for each in rotated)

    if inputs["cos"] is not None and inputs.get("interleaved", True):
        raise PeerError("Liger rotates halves: it has interleaved=False alone")
    return _normed_and_rotated(liger_norm, rotation, inputs)


def flash_attn_qk_norm_rope(**inputs: Any) -> torch.Tensor:
    """qk_norm_rope by flash-attn's Triton norms and rotation."""
    with importing(FLASH_ATTN, inputs["qkv"].device):
        from flash_attn.layers.rotary import apply_rotary_emb
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def norm(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, kind: str
    ) -> torch.Tensor:
        weight = x.new_ones(x.shape[-1]) if weight is None else weight
        return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=kind == "rms")

    def rotation(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        interleaved = inputs.get("interleaved", True)
        return tuple(apply_rotary_emb(each, cos, sin, interleaved=interleaved) for each in (q, k))

    return _normed_and_rotated(norm, rotation, inputs)


def _normed_and_rotated(norm: Norm, rotation: Rotation, inputs: dict[str, Any]) -> torch.Tensor:
    """qkv with the norm and the rotation of a library, neither of which takes tensors of several dtypes."""
    require_one_dtype("the library", inputs)
    qkv = inputs["qkv"]
    heads = inputs.get("num_heads") or qkv.shape[2]
    packed = qkv.flatten(2, 3) if qkv.ndim == 5 else qkv
    q, k, v = _split(packed, heads)
    kind, eps = inputs.get("norm", "none"), inputs.get("eps", 1e-6)

    def normed(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.flatten(2) if inputs.get("over") == "width" else x
        return norm(rows.contiguous(), weight, bias, eps, kind).view(x.shape)

    if kind != "none":
        q = normed(q, inputs["q_weight"], inputs["q_bias"])
        k = normed(k, inputs["k_weight"], inputs["k_bias"])
    if inputs["cos"] is not None:
        q, k = rotation(q, k, inputs["cos"], inputs["sin"])
    return torch.cat((q, k, v), 2).view(qkv.shape)
