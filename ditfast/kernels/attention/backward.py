"""The backward of attention in Triton: dq over the keys, then dk and dv over the queries.

p = exp(scale q k^T - lse), dp = do v^T, ds = p (dp - delta), delta = rowsum(do o), as in arXiv:2205.14135, appendix
B.4: dq = scale ds k,  dk = scale ds^T q,  dv = p^T do. Both parts compute p, seven products instead of five: a single
pass would have to add up dq across programs, by atomics. The first part leaves delta for the second.
"""

import torch

from .._triton import jit, launch, tl
from .tiles import Configs, constants, dense, group, strides

# Not measured on a chip yet. Tiles as the forward's, as far as they compile without spills: with two sums beside two
# products, dk and dv take 32 queries at a time, and 16 on sm_80 from head_dim 88 on and in TF32.
DQ_CONFIGS: Configs = (
    (90, 2, 128, 128, 64, 8, 2),
    (0, 2, 32, 128, 32, 8, 2),
    (0, 2, 96, 128, 64, 8, 2),
    (0, 2, 128, 128, 32, 8, 2),
    (0, 3, 128, 64, 16, 4, 2),
    (0, 4, 32, 64, 16, 8, 2),
    (0, 4, 48, 64, 32, 8, 2),
    (0, 4, 56, 32, 32, 8, 2),
    (0, 4, 128, 64, 16, 8, 2),
)
DKDV_CONFIGS: Configs = (
    (90, 2, 128, 128, 32, 8, 2),
    (0, 2, 80, 128, 32, 8, 2),
    (0, 2, 128, 128, 16, 8, 2),
    (90, 3, 96, 64, 16, 4, 2),
    (90, 3, 128, 32, 16, 4, 2),
    (0, 3, 128, 64, 16, 8, 2),
    (0, 4, 96, 64, 32, 8, 2),
    (0, 4, 128, 64, 16, 8, 2),
)
# The loop over a group's heads takes registers: 128 keys spill. In float32 sm_80 still does, 24 bytes at head_dim 40.
GROUPED_DKDV_CONFIGS: Configs = (
    *((100, 2, 72, 64, 32, 8, 2), (100, 2, 80, 64, 16, 8, 2), (100, 2, 128, 64, 32, 8, 2)),
    *((90, 2, 96, 128, 32, 8, 2), (90, 2, 128, 64, 32, 8, 2), (90, 4, 128, 32, 32, 8, 2)),
    *((0, 2, 80, 128, 32, 8, 2), (0, 2, 96, 128, 16, 8, 2), (0, 2, 128, 64, 16, 8, 2), (0, 4, 128, 32, 16, 8, 2)),
    *DKDV_CONFIGS[3:6],
)


@jit
def dq_tile(
    first,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    Tq,
    Tk,
    scale,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_ot,
    stride_dot,
    stride_dqt,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    STAYS: tl.constexpr,
    PASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dq and delta of the queries from `first`; the pointers are those of one head."""
    row = first + tl.arange(0, STAYS)
    live = (row < Tq)[:, None]
    token = row.to(tl.int64)[:, None]
    key = tl.arange(0, PASSES)
    cols = tl.arange(0, MAIN)[None, :]
    tail_cols = MAIN + tl.arange(0, TAIL if TAIL else 16)[None, :]
    tail_in = tail_cols < HEAD_DIM
    log2_scale = scale * 1.4426950408889634

    q_row = q_ptr + token * stride_qt * UNIT
    do_row = do_ptr + token * stride_dot * UNIT
    o_row = o_ptr + token * stride_ot * HEAD_DIM
    k_row = k_ptr + key.to(tl.int64)[:, None] * stride_kt * UNIT
    v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vt * UNIT
    q = tl.load(q_row + cols, mask=live, other=0.0)
    do = tl.load(do_row + cols, mask=live, other=0.0)
    o = tl.load(o_row + cols, mask=live, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    dq = tl.zeros([STAYS, MAIN], tl.float32)
    if TAIL:
        tail_q = tl.load(q_row + tail_cols, mask=live & tail_in, other=0.0)
        tail_do = tl.load(do_row + tail_cols, mask=live & tail_in, other=0.0)
        tail_o = tl.load(o_row + tail_cols, mask=live & tail_in, other=0.0)
        delta += tl.sum(tail_o.to(tl.float32) * tail_do.to(tl.float32), 1)
        tail_dq = tl.zeros([STAYS, TAIL], tl.float32)
    lse = tl.load(lse_ptr + row, mask=row < Tq, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < Tq)

    for start in range(0, Tk, PASSES):
        there = start + key < Tk
        k = tl.load(k_row + cols, mask=there[:, None], other=0.0)
        v = tl.load(v_row + cols, mask=there[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if TAIL:
            tail_k = tl.load(k_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
            tail_v = tl.load(v_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
            s = tl.dot(tail_q, tl.trans(tail_k), s, input_precision=PRECISION)
            dp = tl.dot(tail_do, tl.trans(tail_v), dp, input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - lse[:, None])
        if not EVEN:
            # Where all scores are far below 0, exp2(0 - lse) of a key that is not there overflows, and inf * 0 is NaN.
            p = tl.where(there[None, :], p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if TAIL:
            tail_dq = tl.dot(ds, tail_k, tail_dq, input_precision=PRECISION)
        k_row += PASSES * tl.cast(stride_kt, tl.int64) * UNIT
        v_row += PASSES * tl.cast(stride_vt, tl.int64) * UNIT

    dq_row = dq_ptr + token * stride_dqt * UNIT
    tl.store(dq_row + cols, dq * scale, mask=live)
    if TAIL:
        tl.store(dq_row + tail_cols, tail_dq * scale, mask=live & tail_in)


@jit
def dkdv_tile(
    first,
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    Tq,
    Tk,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_vt,
    stride_dot,
    stride_doh,
    stride_dkt,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    STAYS: tl.constexpr,
    PASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dk and dv of the keys from `first`; the pointers are those of the group's first head. p and ds are transposed."""
    row = first + tl.arange(0, STAYS)
    live = (row < Tk)[:, None]
    token = row.to(tl.int64)[:, None]
    query = tl.arange(0, PASSES)
    cols = tl.arange(0, MAIN)[None, :]
    tail_cols = MAIN + tl.arange(0, TAIL if TAIL else 16)[None, :]
    tail_in = tail_cols < HEAD_DIM
    log2_scale = scale * 1.4426950408889634

    k_row = k_ptr + token * stride_kt * UNIT
    v_row = v_ptr + token * stride_vt * UNIT
    q_row = q_ptr + query.to(tl.int64)[:, None] * stride_qt * UNIT
    do_row = do_ptr + query.to(tl.int64)[:, None] * stride_dot * UNIT
    past = tl.cdiv(Tq, PASSES).to(tl.int64) * PASSES
    k = tl.load(k_row + cols, mask=live, other=0.0)
    v = tl.load(v_row + cols, mask=live, other=0.0)
    dk = tl.zeros([STAYS, MAIN], tl.float32)
    dv = tl.zeros([STAYS, MAIN], tl.float32)
    if TAIL:
        tail_k = tl.load(k_row + tail_cols, mask=live & tail_in, other=0.0)
        tail_v = tl.load(v_row + tail_cols, mask=live & tail_in, other=0.0)
        tail_dk = tl.zeros([STAYS, TAIL], tl.float32)
        tail_dv = tl.zeros([STAYS, TAIL], tl.float32)

    for _ in range(GROUP):
        for start in range(0, Tq, PASSES):
            # Queries that are not there have q = do = delta = 0 and lse = 0, so p = 1 and ds = 0: they add nothing.
            there = start + query < Tq
            q = tl.load(q_row + cols, mask=there[:, None], other=0.0)
            do = tl.load(do_row + cols, mask=there[:, None], other=0.0)
            lse = tl.load(lse_ptr + start + query, mask=there, other=0.0)
            delta = tl.load(delta_ptr + start + query, mask=there, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if TAIL:
                tail_q = tl.load(q_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
                tail_do = tl.load(do_row + tail_cols, mask=there[:, None] & tail_in, other=0.0)
                s = tl.dot(tail_k, tl.trans(tail_q), s, input_precision=PRECISION)
                dp = tl.dot(tail_v, tl.trans(tail_do), dp, input_precision=PRECISION)
            p = tl.exp2(s * log2_scale - lse[None, :])
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            p = p.to(do.dtype)
            dv = tl.dot(p, do, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if TAIL:
                tail_dv = tl.dot(p, tail_do, tail_dv, input_precision=PRECISION)
                tail_dk = tl.dot(ds, tail_q, tail_dk, input_precision=PRECISION)
            q_row += PASSES * tl.cast(stride_qt, tl.int64) * UNIT
            do_row += PASSES * tl.cast(stride_dot, tl.int64) * UNIT
        q_row += (stride_qh - past * stride_qt) * UNIT
        do_row += (stride_doh - past * stride_dot) * UNIT
        lse_ptr += Tq
        delta_ptr += Tq

    dk_row = token * stride_dkt * UNIT
    tl.store(dk_ptr + dk_row + cols, dk * scale, mask=live)
    tl.store(dv_ptr + dk_row + cols, dv, mask=live)
    if TAIL:
        tl.store(dk_ptr + dk_row + tail_cols, tail_dk * scale, mask=live & tail_in)
        tl.store(dv_ptr + dk_row + tail_cols, tail_dv, mask=live & tail_in)


@jit
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
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
    statistics = (sample * H + h) * Tq
    dq_tile(
        (pid % blocks) * STAYS,
        q_ptr + (sample * stride_qb + h * stride_qh) * UNIT,
        k_ptr + (sample * stride_kb + h // GROUP * stride_kh) * UNIT,
        v_ptr + (sample * stride_vb + h // GROUP * stride_vh) * UNIT,
        o_ptr + (sample * Tq * H + h) * HEAD_DIM,
        do_ptr + (sample * stride_dob + h * stride_doh) * UNIT,
        lse_ptr + statistics,
        delta_ptr + statistics,
        dq_ptr + (sample * stride_dqb + h * stride_dqh) * UNIT,
        Tq,
        Tk,
        scale,
        stride_qt,
        stride_kt,
        stride_vt,
        H,
        stride_dot,
        stride_dqt,
        HEAD_DIM,
        MAIN,
        TAIL,
        UNIT,
        STAYS,
        PASSES,
        PRECISION,
        EVEN,
    )


@jit
def _attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    Tq,
    Tk,
    H_kv,
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
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    STAYS: tl.constexpr,
    PASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid // blocks
    sample, h = (head // H_kv).to(tl.int64), (head % H_kv).to(tl.int64)
    statistics = (sample * H_kv + h) * GROUP * Tq
    dkdv_tile(
        (pid % blocks) * STAYS,
        q_ptr + (sample * stride_qb + h * GROUP * stride_qh) * UNIT,
        k_ptr + (sample * stride_kb + h * stride_kh) * UNIT,
        v_ptr + (sample * stride_vb + h * stride_vh) * UNIT,
        do_ptr + (sample * stride_dob + h * GROUP * stride_doh) * UNIT,
        lse_ptr + statistics,
        delta_ptr + statistics,
        dk_ptr + (sample * stride_dkb + h * stride_dkh) * UNIT,
        dv_ptr + (sample * stride_dkb + h * stride_dkh) * UNIT,
        Tq,
        Tk,
        scale,
        stride_qt,
        stride_qh,
        stride_kt,
        stride_vt,
        stride_dot,
        stride_doh,
        stride_dkt,
        HEAD_DIM,
        MAIN,
        TAIL,
        UNIT,
        STAYS,
        PASSES,
        PRECISION,
        GROUP,
    )


def backward(
    grads: tuple[torch.Tensor, ...],
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Write dq, dk and dv, of which dk and dv have equal strides."""
    dq, dk, dv = grads
    (B, Tq, H, _), (_, Tk, H_kv, _), heads = q.shape, k.shape, group(q, k)
    do, q, k, v = dense(do, q, k, v)
    unit, steps = strides(q, k, v, do, dq, dk)
    inputs, of_dq, of_dk = steps[:12], steps[12:15], steps[15:]
    delta = torch.empty_like(lse)

    meta = constants(q, DQ_CONFIGS, unit, "attention_dq", k)
    blocks = -(-Tq // meta["STAYS"])
    sizes = (Tq, Tk, H, blocks, scale)
    meta |= {"GROUP": heads, "EVEN": Tk % meta["PASSES"] == 0}
    launch(_attention_dq_kernel, B * H * blocks, q, k, v, o, do, lse, delta, dq, *sizes, *inputs, *of_dq, **meta)

    configs = GROUPED_DKDV_CONFIGS if heads > 1 else DKDV_CONFIGS
    meta = constants(q, configs, unit, "attention_dkdv", k) | {"GROUP": heads}
    blocks = -(-Tk // meta["STAYS"])
    sizes = (Tq, Tk, H_kv, blocks, scale)
    launch(_attention_dkdv_kernel, B * H_kv * blocks, q, k, v, do, lse, delta, dk, dv, *sizes, *inputs, *of_dk, **meta)
