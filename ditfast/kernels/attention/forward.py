"""The forward of attention in Triton: one pass over the keys with a running softmax (arXiv:2205.14135, algorithm 1)."""

import torch

from .._triton import jit, launch, tl
from .tiles import Configs, constants, dense, group, strides

# Not measured on a chip yet. 16 bits: 128 queries read K and V half as often as 64 would, and are the 64 rows that
# HGMMA wants for each of two groups of four warps; 64 keys take 120 to 180 registers a thread on sm_90, 128 over 200.
# On sm_80 operands come through registers, and 64 keys of which some are masked spill from head_dim 104 on. float32 has
# no tensor cores, and its operands come through registers too: smaller tiles. In TF32 64 rows are those of four warps.
CONFIGS: Configs = (
    (90, 2, 128, 128, 64, 8, 3),
    (0, 2, 96, 128, 64, 8, 3),
    (0, 2, 128, 128, 32, 8, 3),
    (0, 3, 128, 64, 16, 4, 2),
    (0, 4, 32, 64, 16, 8, 2),
    (0, 4, 96, 64, 32, 8, 2),
    (0, 4, 128, 64, 16, 8, 2),
)


@jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    Tq,
    Tk,
    H,
    blocks,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    STAYS: tl.constexpr,
    PASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid // blocks
    sample, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    kv_head = h // GROUP
    row = (pid % blocks) * STAYS + tl.arange(0, STAYS)
    live = (row < Tq)[:, None]
    token = row.to(tl.int64)[:, None]
    key = tl.arange(0, PASSES)
    cols = tl.arange(0, MAIN)[None, :]
    tail_cols = MAIN + tl.arange(0, TAIL if TAIL else 16)[None, :]
    tail_in = tail_cols < HEAD_DIM
    log2_scale = scale * 1.4426950408889634

    q_row = q_ptr + (sample * stride_qb + h * stride_qh + token * stride_qt) * UNIT
    k_row = k_ptr + (sample * stride_kb + kv_head * stride_kh + key.to(tl.int64)[:, None] * stride_kt) * UNIT
    v_row = v_ptr + (sample * stride_vb + kv_head * stride_vh + key.to(tl.int64)[:, None] * stride_vt) * UNIT
    q = tl.load(q_row + cols, mask=live, other=0.0)
    o = tl.zeros([STAYS, MAIN], tl.float32)
    if TAIL:
        tail_q = tl.load(q_row + tail_cols, mask=live & tail_in, other=0.0)
        tail_o = tl.zeros([STAYS, TAIL], tl.float32)
    most = tl.full([STAYS], float("-inf"), tl.float32)
    total = tl.zeros([STAYS], tl.float32)

    for start in range(0, Tk, PASSES):
        there = start + key < Tk
        k = tl.load(k_row + cols, mask=there[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            tail_k = tl.load(k_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
            s = tl.dot(tail_q, tl.trans(tail_k), s, input_precision=PRECISION)
        if not EVEN:
            s = tl.where(there[None, :], s, float("-inf"))
        new_most = tl.maximum(most, tl.max(s, 1) * log2_scale)
        # Where all scores so far are -inf, so is the maximum, and -inf - -inf is NaN.
        base = tl.where(new_most == float("-inf"), 0.0, new_most)
        p = tl.exp2(s * log2_scale - base[:, None])
        shrink = tl.exp2(most - base)
        most = new_most
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_row + cols, mask=there[:, None], other=0.0)
        p = p.to(v.dtype)
        o = tl.dot(p, v, o * shrink[:, None], input_precision=PRECISION)
        if TAIL:
            tail_v = tl.load(v_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
            tail_o = tl.dot(p, tail_v, tail_o * shrink[:, None], input_precision=PRECISION)
        k_row += PASSES * tl.cast(stride_kt, tl.int64) * UNIT
        v_row += PASSES * tl.cast(stride_vt, tl.int64) * UNIT

    o_row = o_ptr + ((sample * Tq + token) * H + h) * HEAD_DIM
    tl.store(o_row + cols, o / total[:, None], mask=live)
    if TAIL:
        tl.store(o_row + tail_cols, tail_o / total[:, None], mask=live & tail_in)
    tl.store(lse_ptr + (sample * H + h) * Tq + row, most + tl.log2(total), mask=row < Tq)


def empty(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of q (B, Tq, H, head_dim), not yet written."""
    B, Tq, H, _ = q.shape
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((B, H, Tq), dtype=torch.float32, device=q.device),
    )


def forward(results: tuple[torch.Tensor, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
    """Write o (B, Tq, H, head_dim) and lse (B, H, Tq)."""
    o, lse = results
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    q, k, v = dense(q, k, v)
    unit, steps = strides(q, k, v)
    meta = constants(q, CONFIGS, unit, "attention_fwd", k)
    blocks = -(-Tq // meta["STAYS"])
    meta |= {"GROUP": group(q, k), "EVEN": Tk % meta["PASSES"] == 0}
    launch(_attention_fwd_kernel, B * H * blocks, q, k, v, o, lse, Tq, Tk, H, blocks, scale, *steps, **meta)
