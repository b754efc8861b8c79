"""Attention in plain PyTorch."""

import torch


def attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The equation; it holds the (B, H, Tq, Tk) weights in memory."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def attention_qkvpacked_ref(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """`attention_ref` of the three slices."""
    q, k, v = qkv.unbind(2)
    return attention_ref(q, k, v, scale)
