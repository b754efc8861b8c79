"""qk_norm_rope in plain PyTorch."""

import torch
import torch.nn.functional as F


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    interleaved: bool,
    over: str,
) -> torch.Tensor:
    """The equation in plain PyTorch, the norm in the wider dtype of its operands."""

    def normed(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        wide = x.flatten(2) if over == "width" else x
        for other in (weight, bias):
            wide = wide if other is None else wide.to(torch.promote_types(wide.dtype, other.dtype))
        weight, bias = (None if other is None else other.to(wide.dtype) for other in (weight, bias))
        if norm == "layer":
            wide = F.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
        elif norm == "rms":
            wide = F.rms_norm(wide, wide.shape[-1:], weight, eps)
        return wide.view_as(x)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if cos is None or sin is None:
            return x
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        pair = a * c - b * s, a * s + b * c
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    kv_heads = (qkv.shape[2] - num_heads) // 2
    q, k, v = qkv.split((num_heads, kv_heads, kv_heads), 2)
    q, k = rotated(normed(q, q_weight, q_bias)), rotated(normed(k, k_weight, k_bias))
    return torch.cat((q.to(qkv.dtype), k.to(qkv.dtype), v), 2)
