"""The backward of attention in Triton for up to 256 tokens: one program does the whole of one head.

The parts are those of backward.py, one after the other; q, k, v and do of a head, 144 KiB at 256 tokens of 72 in two
bytes, then stay in the L1 cache of the multiprocessor. That is why the loads are not pipelined: asynchronous copies
would pass the L1 by.
"""

import torch

from .._triton import jit, launch, tl
from .backward import dkdv_tile, dq_tile
from .tiles import Configs, constants, dense, group, strides

LONGEST = 256
# Not measured on a chip yet. The tiles of the second part of backward.py, which are the smaller ones; on sm_80 masked
# keys spill with 32 from head_dim 72 on. None in float32: both parts in one program spill at any tile. So do whole
# operands of 256 rows in shared memory, 600 to 14,000 bytes: on the way there Triton holds them in registers.
CONFIGS: Configs = (
    (90, 2, 128, 128, 32, 8, 1),
    (0, 2, 64, 128, 32, 8, 1),
    (0, 2, 128, 128, 16, 8, 1),
)


@jit
def _attention_short_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    Tq,
    Tk,
    H,
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
    EVEN: tl.constexpr,
):
    head = tl.program_id(0)
    sample, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    statistics = head.to(tl.int64) * Tq
    q_ptr += (sample * stride_qb + h * stride_qh) * UNIT
    k_ptr += (sample * stride_kb + h * stride_kh) * UNIT
    v_ptr += (sample * stride_vb + h * stride_vh) * UNIT
    do_ptr += (sample * stride_dob + h * stride_doh) * UNIT
    o_ptr += (sample * Tq * H + h) * HEAD_DIM
    dq_ptr += (sample * stride_dqb + h * stride_dqh) * UNIT
    dk_ptr += (sample * stride_dkb + h * stride_dkh) * UNIT
    dv_ptr += (sample * stride_dkb + h * stride_dkh) * UNIT
    lse_ptr += statistics
    delta_ptr += statistics
    for first in range(0, Tq, STAYS):
        dq_tile(
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
    # Delta is read by other threads than wrote it.
    tl.debug_barrier()
    for first in range(0, Tk, STAYS):
        dkdv_tile(
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
            HEAD_DIM,
            MAIN,
            TAIL,
            UNIT,
            STAYS,
            PASSES,
            PRECISION,
            1,
        )


def takes(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the form is for such tensors: 16 bits, few enough tokens for one program a head, and a head of k each.

    With a group of heads to one of k, the L1 has no room for their q and do, and there are too few programs.
    """
    return q.element_size() == 2 and max(q.shape[1], k.shape[1]) <= LONGEST and group(q, k) == 1


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
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    do, q, k, v = dense(do, q, k, v)
    unit, steps = strides(q, k, v, do, dq, dk)
    meta = constants(q, CONFIGS, unit)
    meta["EVEN"] = Tk % meta["PASSES"] == 0
    tensors = (q, k, v, o, do, lse, torch.empty_like(lse), dq, dk, dv)
    launch(_attention_short_bwd_kernel, B * H, *tensors, Tq, Tk, H, scale, *steps, **meta)
