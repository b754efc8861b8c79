"""The kernels of qk_norm_rope with a norm per head, or none: a tile is some tokens of one head.

A program owns a chunk of one sample's tokens and one of q, k, v, holds its cos and sin for all heads, and writes one
partial row of dweight and dbias, which _rows.py adds up.
"""

import torch

from .._heads import (
    load_angles,
    load_pairs,
    load_parameter,
    norm_pairs,
    norm_pairs_backward,
    section_of,
    store_pairs,
)
from .._rows import rows_per_program
from .._triton import jit, tl
from ..autotune import pick

# Not measured on a chip yet. A tile is 16 tokens of one head, 8 elements of each tensor a thread at head_dim 64; up to
# 64 tokens of all heads share one partial row, and the cos and sin of 16 are read once for all heads.
BLOCK_T, ROWS, WARPS = 16, 64, 4


@jit
def qk_norm_rope_fwd_kernel(
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    T,
    chunks,
    eps,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    pid = tl.program_id(0)
    section, first_head, heads = section_of(pid, HEADS, KV_HEADS)
    sample = (pid // 3 // chunks).to(tl.int64)
    first = (pid // 3 % chunks) * ROWS
    one = tl.arange(0, 1)
    weight_a, weight_b = load_parameter(q_weight_ptr, 1.0, one, 1, HALF, PAIRS, INTERLEAVED)
    bias_a, bias_b = load_parameter(q_bias_ptr, 0.0, one, 1, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = load_parameter(k_weight_ptr, 1.0, one, 1, HALF, PAIRS, INTERLEAVED)
        bias_a, bias_b = load_parameter(k_bias_ptr, 0.0, one, 1, HALF, PAIRS, INTERLEAVED)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, section, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, section, T, HALF, PAIRS)
        for h in range(0, heads):
            head = first_head + h
            x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
            out_row = out_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if NORM != "none":
                    a, b, _ = norm_pairs(a, b, live, eps, HALF, NORM, 2 * HALF, False)
                    a, b = a * weight_a + bias_a, b * weight_b + bias_b
                if cos_ptr is not None:
                    a, b = a * cos - b * sin, a * sin + b * cos
            store_pairs(out_row, a, b, live, HALF, PAIRS, INTERLEAVED)


@jit
def qk_norm_rope_bwd_kernel(
    dout_ptr,
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    q_partial_ptr,
    k_partial_ptr,
    T,
    chunks,
    eps,
    stride_dout_b,
    stride_dout_t,
    stride_dout_h,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    pid = tl.program_id(0)
    section, first_head, heads = section_of(pid, HEADS, KV_HEADS)
    chunk = (pid // 3).to(tl.int64)
    sample = chunk // chunks
    first = (pid // 3 % chunks) * ROWS
    one = tl.arange(0, 1)
    weight_a, weight_b = load_parameter(q_weight_ptr, 1.0, one, 1, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = load_parameter(k_weight_ptr, 1.0, one, 1, HALF, PAIRS, INTERLEAVED)
    dweight_a = tl.zeros([1, PAIRS], tl.float32)
    dweight_b = tl.zeros([1, PAIRS], tl.float32)
    dbias_a = tl.zeros([1, PAIRS], tl.float32)
    dbias_b = tl.zeros([1, PAIRS], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, section, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, section, T, HALF, PAIRS)
        for h in range(0, heads):
            head = first_head + h
            dout_row = dout_ptr + sample * stride_dout_b + token64 * stride_dout_t + head * stride_dout_h
            dx_row = dx_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            da, db = load_pairs(dout_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if cos_ptr is not None:
                    da, db = da * cos + db * sin, db * cos - da * sin
                if NORM != "none":
                    x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
                    a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
                    a, b, rstd = norm_pairs(a, b, live, eps, HALF, NORM, 2 * HALF, False)
                    dweight_a += tl.sum(da * a, 0)[None, :]
                    dweight_b += tl.sum(db * b, 0)[None, :]
                    dbias_a += tl.sum(da, 0)[None, :]
                    dbias_b += tl.sum(db, 0)[None, :]
                    da, db = da * weight_a, db * weight_b
                    da, db = norm_pairs_backward(da, db, a, b, rstd, NORM, 2 * HALF, False)
            store_pairs(dx_row, da, db, live, HALF, PAIRS, INTERLEAVED)

    if q_partial_ptr is not None:
        # Each (chunks of all samples, 2, head_dim); v has none.
        at = tl.where(section == 0, q_partial_ptr, k_partial_ptr) + chunk * (4 * HALF) + one
        store_pairs(at, dweight_a, dweight_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)
        store_pairs(at + 2 * HALF, dbias_a, dbias_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)


def tiling(kernel: str, qkv: torch.Tensor, num_heads: int, norm: str, interleaved: bool) -> tuple[int, dict[str, int]]:
    """(chunks of tokens per sample, constants of the launch)."""
    B, T, _, head_dim = qkv.shape
    if head_dim > 256:
        raise ValueError(f"qk_norm_rope: head_dim is {head_dim}, the kernels take up to 256; use backend='reference'")
    tile, most, warps = pick(f"qk_norm_rope_{kernel}", (BLOCK_T, ROWS, WARPS), qkv, num_heads, norm, interleaved)
    per_program = rows_per_program(tile, most, 3 * B, T)
    return -(-T // per_program), {"BLOCK_T": tile, "ROWS": per_program, "num_warps": warps}
