"""The kernels of qk_norm_rope with a norm over all heads: a tile is one token's heads of q, of k, or of v.

A program owns a chunk of one sample's tokens and one of q, k, v, holds its parameters, and writes one partial row of
dweight and dbias, which _rows.py adds up.
"""

import torch

from .._heads import load_angles, load_pairs, load_parameter, norm_pairs, norm_pairs_backward, store_pairs
from .._rows import rows_per_program
from .._triton import jit, tl
from ..autotune import pick

# (largest tile, tokens of a program, warps). Not measured on a chip yet: 16 elements of each tensor a thread.
CONFIGS = ((1024, 64, 2), (2048, 64, 4), (4096, 64, 8), (8192, 64, 16))
# A partial row is four float32 for every channel of so many tokens, even where that leaves multiprocessors idle.
LEAST = 8


@jit
def _forward_heads(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    sample,
    first,
    T,
    eps,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write out's HEADS heads from FIRST on, of a chunk of tokens."""
    head = tl.arange(0, TILE)
    live = head < HEADS
    at = (FIRST + head).to(tl.int64)
    weight_a, weight_b = load_parameter(weight_ptr, 1.0, head, HEADS, HALF, PAIRS, INTERLEAVED)
    bias_a, bias_b = load_parameter(bias_ptr, 0.0, head, HEADS, HALF, PAIRS, INTERLEAVED)
    for t in range(first, tl.minimum(first + ROWS, T)):
        token = t + tl.arange(0, 1)
        token64 = token.to(tl.int64)
        x_row = x_ptr + sample * stride_xb + token64 * stride_xt + at * stride_xh
        a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
        if NORM != "none":
            a, b, _ = norm_pairs(a, b, live, eps, HALF, NORM, HEADS * 2 * HALF, True)
            a, b = a * weight_a + bias_a, b * weight_b + bias_b
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, 0, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, 0, T, HALF, PAIRS)
            a, b = a * cos - b * sin, a * sin + b * cos
        out_row = out_ptr + ((sample * T + token64) * N + at) * (2 * HALF)
        store_pairs(out_row, a, b, live, HALF, PAIRS, INTERLEAVED)


@jit
def qk_norm_rope_width_fwd_kernel(
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
    Q_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    section = tl.program_id(0) % 3
    chunk = tl.program_id(0) // 3
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * ROWS
    if section == 0:
        _forward_heads(
            *(x_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, out_ptr, sample, first, T, eps),
            *(stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, 0, HEADS, Q_TILE, HALF, PAIRS, NORM, INTERLEAVED, ROWS),
        )
    elif section == 1:
        _forward_heads(
            *(x_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, out_ptr, sample, first, T, eps),
            *(stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, NORM, INTERLEAVED, ROWS),
        )
    else:
        _forward_heads(
            *(x_ptr, None, None, None, None, out_ptr, sample, first, T, eps),
            *(stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, HEADS + KV_HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, "none", INTERLEAVED, ROWS),
        )


@jit
def _backward_heads(
    dout_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    partial_ptr,
    sample,
    first,
    chunk,
    T,
    eps,
    stride_dout_b,
    stride_dout_t,
    stride_dout_h,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write dx's HEADS heads from FIRST on, of a chunk of tokens, and the chunk's sums."""
    head = tl.arange(0, TILE)
    live = head < HEADS
    at = (FIRST + head).to(tl.int64)
    weight_a, weight_b = load_parameter(weight_ptr, 1.0, head, HEADS, HALF, PAIRS, INTERLEAVED)
    dweight_a = tl.zeros([TILE, PAIRS], tl.float32)
    dweight_b = tl.zeros([TILE, PAIRS], tl.float32)
    dbias_a = tl.zeros([TILE, PAIRS], tl.float32)
    dbias_b = tl.zeros([TILE, PAIRS], tl.float32)
    for t in range(first, tl.minimum(first + ROWS, T)):
        token = t + tl.arange(0, 1)
        token64 = token.to(tl.int64)
        dout_row = dout_ptr + sample * stride_dout_b + token64 * stride_dout_t + at * stride_dout_h
        da, db = load_pairs(dout_row, live, HALF, PAIRS, INTERLEAVED)
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, 0, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, 0, T, HALF, PAIRS)
            da, db = da * cos + db * sin, db * cos - da * sin
        if NORM != "none":
            x_row = x_ptr + sample * stride_xb + token64 * stride_xt + at * stride_xh
            a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
            a, b, rstd = norm_pairs(a, b, live, eps, HALF, NORM, HEADS * 2 * HALF, True)
            dweight_a += da * a
            dweight_b += db * b
            dbias_a += da
            dbias_b += db
            da, db = da * weight_a, db * weight_b
            da, db = norm_pairs_backward(da, db, a, b, rstd, NORM, HEADS * 2 * HALF, True)
        dx_row = dx_ptr + ((sample * T + token64) * N + at) * (2 * HALF)
        store_pairs(dx_row, da, db, live, HALF, PAIRS, INTERLEAVED)

    if partial_ptr is not None:
        # (chunks of all samples, 2, HEADS * head_dim)
        partial = partial_ptr + (chunk * (2 * HEADS) + head) * (2 * HALF)
        store_pairs(partial, dweight_a, dweight_b, live, HALF, PAIRS, INTERLEAVED)
        store_pairs(partial + HEADS * 2 * HALF, dbias_a, dbias_b, live, HALF, PAIRS, INTERLEAVED)


@jit
def qk_norm_rope_width_bwd_kernel(
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
    Q_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    section = tl.program_id(0) % 3
    chunk = (tl.program_id(0) // 3).to(tl.int64)
    sample = chunk // chunks
    first = (tl.program_id(0) // 3 % chunks) * ROWS
    if section == 0:
        _backward_heads(
            *(dout_ptr, x_ptr, q_weight_ptr, cos_ptr, sin_ptr, dx_ptr, q_partial_ptr, sample, first, chunk, T, eps),
            *(stride_dout_b, stride_dout_t, stride_dout_h, stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, 0, HEADS, Q_TILE, HALF, PAIRS, NORM, INTERLEAVED, ROWS),
        )
    elif section == 1:
        _backward_heads(
            *(dout_ptr, x_ptr, k_weight_ptr, cos_ptr, sin_ptr, dx_ptr, k_partial_ptr, sample, first, chunk, T, eps),
            *(stride_dout_b, stride_dout_t, stride_dout_h, stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, NORM, INTERLEAVED, ROWS),
        )
    else:
        _backward_heads(
            *(dout_ptr, x_ptr, None, None, None, dx_ptr, None, sample, first, chunk, T, eps),
            *(stride_dout_b, stride_dout_t, stride_dout_h, stride_xb, stride_xt, stride_xh, stride_cos, stride_sin),
            *(N, HEADS + KV_HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, "none", INTERLEAVED, ROWS),
        )


def tiling(kernel: str, qkv: torch.Tensor, num_heads: int, norm: str, interleaved: bool) -> tuple[int, dict[str, int]]:
    """(chunks of tokens per sample, constants of the launch)."""
    B, T, N, head_dim = qkv.shape
    q_tile, kv_tile, channels = (1 << (n - 1).bit_length() for n in (num_heads, (N - num_heads) // 2, head_dim))
    widest = max(q_tile, kv_tile) * channels
    if widest > CONFIGS[-1][0]:
        raise ValueError(
            f"qk_norm_rope: qkv has {num_heads} of {N} heads for q, of head_dim {head_dim}; with over='width' the "
            f"kernels take up to {CONFIGS[-1][0]} channels, both numbers as powers of two; use backend='reference'"
        )
    pinned = next(config[1:] for config in CONFIGS if config[0] >= widest)
    most, warps = pick(f"qk_norm_rope_width_{kernel}", pinned, qkv, num_heads, norm, interleaved)
    per_program = rows_per_program(LEAST, most, 3 * B, T)
    meta = {"Q_TILE": q_tile, "KV_TILE": kv_tile, "ROWS": per_program, "num_warps": warps}
    return -(-T // per_program), meta
