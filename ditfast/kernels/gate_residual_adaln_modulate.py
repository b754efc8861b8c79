"""x_new = x + gate * branch; y = LayerNorm(x_new) * (1 + scale) + shift: the boundary between two blocks as one op.

n = (x_new - mean) * rstd, of x_new as rounded to x's dtype, so that a recomputed norm is the same; with
g = dy * (1 + scale), means over D and sums over T:
dx = dx_new + rstd * (g - mean(g) - n * mean(g * n)),  dbranch = gate * dx,
dgate = sum(branch * dx),  dshift = sum(dy),  dscale = sum(dy * n).

x, branch           (B, T, D), batch and row strides free, the last dim dense (else copied); dx_new, dy likewise
gate, shift, scale  (B, D), row strides free: views from chunk(6) are read in place; gate None is a plain residual
x_new, y            (B, T, D), contiguous; x_new in x's dtype, y in out_dtype
dtypes              float32, bfloat16, float16, each tensor its own; D up to 8192
fp32                all arithmetic, mean and rstd, the partial sums: one rounding per stored value
saved               x_new, branch (but for its gate), gate, shift, scale (of the modulation views nothing is copied);
                    mean and rstd (B, T) in fp32

The forward reads x and branch once, the backward dx_new, dy, x_new and branch. A program of the backward owns a chunk
of rows inside one sample, keeps dshift, dscale and dgate in registers and writes one partial row of each, which
_rows.py adds up.
"""

import torch

from ._checks import check_dims, check_floating
from ._op import Kernels, Op
from ._rows import empty_partials, gate_rows, gated_branch, sum_partials, tiling
from ._triton import jit, launch, rows, tl
from .adaln_modulate import adaln_modulate_ref
from .gate_residual import gate_residual_ref
from .spec import XL_CASES, Case, OpSpec, token_cases

DIMS = {"x": "B T D", "branch": "B T D", "gate": "B D", "shift": "B D", "scale": "B D"}

# (largest D, rows of a tile, rows of a program, warps). Not measured on a chip yet; chosen as in adaln_modulate.py, but
# tiles of half the rows, since there are more tensors to hold: at D 1152 four blocks of a forward share an SM, where
# tiles of 4 rows would leave two, and a backward of 2 rows spills (sm_90, triton 3.6). 64 rows of a backward share
# three partial rows: 12 bytes per 64 x 12 in bf16, written and read, 3 % more.
FWD_CONFIGS = ((64, 16, 32, 4), (256, 8, 16, 4), (512, 4, 8, 4), (1536, 2, 8, 4), (4096, 1, 8, 8), (8192, 1, 8, 16))
BWD_CONFIGS = ((64, 16, 64, 4), (256, 8, 64, 4), (512, 4, 64, 4), (1536, 1, 64, 4), (4096, 1, 64, 8), (8192, 1, 64, 16))


def gate_residual_adaln_modulate_ref(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two references, one after the other."""
    x_new = gate_residual_ref(x, branch, gate)
    return x_new, adaln_modulate_ref(x_new, shift, scale, eps, out_dtype)


@jit
def _gate_residual_adaln_modulate_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_new_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    chunks,
    eps,
    stride_xb,
    stride_xt,
    stride_branch_b,
    stride_branch_t,
    stride_gate,
    stride_shift,
    stride_scale,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // chunks).to(tl.int64)
    first = (pid % chunks) * ROWS
    cols = tl.arange(0, MAIN)
    shift = tl.load(shift_ptr + sample * stride_shift + cols).to(tl.float32)
    scale = tl.load(scale_ptr + sample * stride_scale + cols).to(tl.float32) + 1.0
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gate + cols).to(tl.float32)
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_shift = tl.load(shift_ptr + sample * stride_shift + tail_cols, mask=tail_in, other=0.0).to(tl.float32)
        tail_scale = (
            tl.load(scale_ptr + sample * stride_scale + tail_cols, mask=tail_in, other=0.0).to(tl.float32) + 1.0
        )
        if gate_ptr is not None:
            tail_gate = tl.load(gate_ptr + sample * stride_gate + tail_cols, mask=tail_in, other=0.0).to(tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        live = row < T
        row64 = row.to(tl.int64)[:, None]
        x_row = x_ptr + sample * stride_xb + row64 * stride_xt
        branch_row = branch_ptr + sample * stride_branch_b + row64 * stride_branch_t
        out_row = sample * T + row
        x_new_row = x_new_ptr + out_row[:, None] * D
        x = tl.load(x_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        branch = tl.load(branch_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        if gate_ptr is not None:
            branch = branch * gate[None, :]
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_row + cols[None, :], x_new, mask=live[:, None])
        x = x_new.to(tl.float32)
        total = tl.sum(x, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_x = tl.load(x_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_branch = tl.load(branch_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                tail_branch = tail_branch * tail_gate[None, :]
            tail_x_new = (tail_x + tail_branch).to(x_new_ptr.dtype.element_ty)
            tl.store(x_new_row + tail_cols[None, :], tail_x_new, mask=tail_live)
            tail_x = tail_x_new.to(tl.float32)
            total += tl.sum(tail_x, 1)
        mean = total / D
        x = x - mean[:, None]
        square = tl.sum(x * x, 1)
        if TAIL:
            tail_x = tl.where(tail_live, tail_x - mean[:, None], 0.0)
            square += tl.sum(tail_x * tail_x, 1)
        rstd = 1.0 / tl.sqrt(square / D + eps)

        tl.store(mean_ptr + out_row, mean, mask=live)
        tl.store(rstd_ptr + out_row, rstd, mask=live)
        y_row = y_ptr + out_row[:, None] * D
        y = x * rstd[:, None] * scale[None, :] + shift[None, :]
        tl.store(y_row + cols[None, :], y, mask=live[:, None])
        if TAIL:
            tail_y = tail_x * rstd[:, None] * tail_scale[None, :] + tail_shift[None, :]
            tl.store(y_row + tail_cols[None, :], tail_y, mask=tail_live)


@jit
def _gate_residual_adaln_modulate_bwd_kernel(
    dx_new_ptr,
    dy_ptr,
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    partial_ptr,
    T,
    chunks,
    stride_dx_new_b,
    stride_dx_new_t,
    stride_dyb,
    stride_dyt,
    stride_branch_b,
    stride_branch_t,
    stride_gate,
    stride_scale,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if gate_ptr is None else 3
    pid = tl.program_id(0)
    sample = (pid // chunks).to(tl.int64)
    first = (pid % chunks) * ROWS
    cols = tl.arange(0, MAIN)
    scale = tl.load(scale_ptr + sample * stride_scale + cols).to(tl.float32) + 1.0
    dshift = tl.zeros([MAIN], tl.float32)
    dscale = tl.zeros([MAIN], tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gate + cols).to(tl.float32)
        dgate = tl.zeros([MAIN], tl.float32)
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_scale = (
            tl.load(scale_ptr + sample * stride_scale + tail_cols, mask=tail_in, other=0.0).to(tl.float32) + 1.0
        )
        tail_dshift = tl.zeros([TAIL], tl.float32)
        tail_dscale = tl.zeros([TAIL], tl.float32)
        if gate_ptr is not None:
            tail_gate = tl.load(gate_ptr + sample * stride_gate + tail_cols, mask=tail_in, other=0.0).to(tl.float32)
            tail_dgate = tl.zeros([TAIL], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        live = row < T
        row64 = row.to(tl.int64)[:, None]
        # x_new was written by the forward, and so is contiguous, as dx and dbranch are.
        start = (sample * T + row64) * D
        dx_new_row = dx_new_ptr + sample * stride_dx_new_b + row64 * stride_dx_new_t
        dy_row = dy_ptr + sample * stride_dyb + row64 * stride_dyt
        if gate_ptr is not None:
            branch_row = branch_ptr + sample * stride_branch_b + row64 * stride_branch_t
        mean = tl.load(mean_ptr + sample * T + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + sample * T + row, mask=live, other=0.0)[:, None]

        n = tl.load(x_new_ptr + start + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        n = (n - mean) * rstd
        dy = tl.load(dy_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        dshift += tl.sum(dy, 0)
        dscale += tl.sum(dy * n, 0)
        g = dy * scale[None, :]
        g_mean = tl.sum(g, 1)
        gn_mean = tl.sum(g * n, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_n = tl.load(x_new_ptr + start + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_n = (tail_n - mean) * rstd
            tail_dy = tl.load(dy_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_dshift += tl.sum(tail_dy, 0)
            tail_dscale += tl.sum(tail_dy * tail_n, 0)
            tail_g = tail_dy * tail_scale[None, :]
            g_mean += tl.sum(tail_g, 1)
            gn_mean += tl.sum(tail_g * tail_n, 1)
        g_mean = (g_mean / D)[:, None]
        gn_mean = (gn_mean / D)[:, None]

        dx = tl.load(dx_new_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        dx += (g - g_mean - n * gn_mean) * rstd
        tl.store(dx_ptr + start + cols[None, :], dx, mask=live[:, None])
        if gate_ptr is not None:
            branch = tl.load(branch_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
            dgate += tl.sum(branch * dx, 0)
            dx = dx * gate[None, :]
        tl.store(dbranch_ptr + start + cols[None, :], dx, mask=live[:, None])
        if TAIL:
            tail_dx = tl.load(dx_new_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_dx += (tail_g - g_mean - tail_n * gn_mean) * rstd
            tl.store(dx_ptr + start + tail_cols[None, :], tail_dx, mask=tail_live)
            if gate_ptr is not None:
                tail_branch = tl.load(branch_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
                tail_dgate += tl.sum(tail_branch * tail_dx, 0)
                tail_dx = tail_dx * tail_gate[None, :]
            tl.store(dbranch_ptr + start + tail_cols[None, :], tail_dx, mask=tail_live)

    partial = partial_ptr + pid.to(tl.int64) * (PARTS * D)
    tl.store(partial + cols, dshift)
    tl.store(partial + D + cols, dscale)
    if gate_ptr is not None:
        tl.store(partial + 2 * D + cols, dgate)
    if TAIL:
        tl.store(partial + tail_cols, tail_dshift, mask=tail_in)
        tl.store(partial + D + tail_cols, tail_dscale, mask=tail_in)
        if gate_ptr is not None:
            tl.store(partial + 2 * D + tail_cols, tail_dgate, mask=tail_in)


def _gate_residual_adaln_modulate_empty(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """x_new, y, mean, rstd, not yet written."""
    x_new, y = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (x.dtype, out_dtype))
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return x_new, y, mean, rstd


def _gate_residual_adaln_modulate_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    B, T, D = x.shape
    chunks, meta = tiling(_OP.name, FWD_CONFIGS, B, T, D)
    x, branch, shift, scale = rows(x), rows(branch), rows(shift), rows(scale)
    gate, stride_gate = gate_rows(gate)
    strides = (*x.stride()[:2], *branch.stride()[:2], stride_gate, shift.stride(0), scale.stride(0))
    args = (x, branch, gate, shift, scale, *results, T, chunks, eps, *strides)
    launch(_gate_residual_adaln_modulate_fwd_kernel, B * chunks, *args, **meta)


def _gate_residual_adaln_modulate_bwd(
    grads: tuple[torch.Tensor, ...],
    dx_new: torch.Tensor,
    dy: torch.Tensor,
    x_new: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    dx, dbranch, dgate, dshift, dscale = grads
    B, T, D = x_new.shape
    chunks, meta = tiling(_OP.name, BWD_CONFIGS, B, T, D)
    dx_new, dy, x_new, scale = rows(dx_new), rows(dy), x_new.contiguous(), rows(scale)
    (kept, *strides_branch), (gate, stride_gate) = gated_branch(branch, gate), gate_rows(gate)
    sums = (dshift, dscale) if gate is None else (dshift, dscale, dgate)
    partial = empty_partials(B, chunks, len(sums), D, x_new.device)
    strides = (*dx_new.stride()[:2], *dy.stride()[:2], *strides_branch, stride_gate, scale.stride(0))
    tensors = (dx_new, dy, x_new, kept, gate, scale, mean, rstd, dx, dbranch, partial)
    launch(_gate_residual_adaln_modulate_bwd_kernel, B * chunks, *tensors, T, chunks, *strides, **meta)
    sum_partials(partial, *sums)


_OP = Op(
    "gate_residual_adaln_modulate",
    gate_residual_adaln_modulate_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor branch, Tensor? gate, Tensor shift, Tensor scale",
        attrs="float eps, ScalarType out_dtype",
        outputs=("x_new", "y"),
        saved=("mean", "rstd"),
        empty=_gate_residual_adaln_modulate_empty,
        fwd=_gate_residual_adaln_modulate_fwd,
        bwd=_gate_residual_adaln_modulate_bwd,
        stand_ins={"x": "x_new"},
        unread_without={"branch": "gate"},
    ),
)


def gate_residual_adaln_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_new, y): x_new = x + gate * branch in x's dtype and y = LN(x_new) * (1 + scale) + shift in out_dtype (x's).

    x and branch are (B, T, D), gate (or None), shift and scale (B, D). ValueError for shapes that disagree or dtypes
    that are not floating; BackendError where the backend cannot run.
    """
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x, branch, gate, shift, scale), (eps, out_dtype or x.dtype))


SPEC = OpSpec(
    op=_OP,
    fn=gate_residual_adaln_modulate,
    dims=DIMS,
    cases=(*token_cases(), Case("no_gate", {"B": 5, "T": 63, "D": 48}, absent=("gate",))),
    bench=XL_CASES,
    stream=("x",),
    optional=("gate",),
    shard=("B", "T"),
    recompute=("x_new", "y"),
    bwd_unread=("shift",),
)
