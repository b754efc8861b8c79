"""Attention in plain PyTorch."""

import torch


def attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The equation; it holds the (B, H, Tq, Tk) weights in memory."""
    k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    weights = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def attention_qkvpacked_ref(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """`attention_ref` of the three slices."""
    return attention_ref(*unpacked(qkv, num_heads), scale)


def repeated(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """k or v (B, Tk, H_kv, head_dim) with every head as often in a row as it serves one of num_heads heads of q."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], 2)


def unpacked(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as views of qkv (B, T, 3, num_heads, head_dim) or (B, T, num_heads + 2 H_kv, head_dim)."""
    kv_heads = (qkv.shape[2] - num_heads) // 2
    q, k, v = qkv.unbind(2) if qkv.ndim == 5 else qkv.split((num_heads, kv_heads, kv_heads), 2)
    return q, k, v
