"""The kernels of a modulated norm, of a stream as it is or with a gated branch added to it first.

With x_new = x + gate * branch, rounded to x's dtype (x itself where there is no branch), and f = (1 + scale) * weight:
LayerNorm  n = (x_new - mean) * rstd, rstd = 1 / sqrt(var + eps), var biased
RMSNorm    n = x_new * rstd, rstd = 1 / sqrt(mean(x_new^2) + eps)
y = n * f + shift. With g = dy * f, means over D (that of g in LayerNorm only) and sums over T:
dx = dx_new + rstd * (g - mean(g) - n * mean(g * n)),  dbranch = gate * dx,  dgate = sum(branch * dx),
dshift = sum(dy),  dscale = weight * sum(dy * n),  dweight = sum over the samples of (1 + scale) * sum(dy * n).

Of what is absent the pointer is None, and Triton compiles a kernel without it. A program of the backward owns a chunk
of rows inside one sample, keeps the sums in registers and writes one partial row of each, which _rows.py adds up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ._rows import empty_partials, laid_out, sum_partials, tiling
from ._triton import jit, launch, tl
from .spec import XL_SIZES, Case, token_cases

NORMS = ("layer", "rms")
Configs = tuple[tuple[int, int, int, int], ...]


@jit
def _vector(ptr, offset, cols, inside, ABSENT: tl.constexpr):
    """Elements of a row in float32: all are there where `inside` is None, each is ABSENT where there is no tensor."""
    if ptr is None:
        return tl.full(cols.shape, ABSENT, tl.float32)
    elif inside is None:
        return tl.load(ptr + offset + cols).to(tl.float32)
    else:
        return tl.load(ptr + offset + cols, mask=inside, other=0.0).to(tl.float32)


@jit
def _factor(scale_ptr, offset, weight_ptr, cols, inside):
    """(1 + scale) * weight."""
    return (_vector(scale_ptr, offset, cols, inside, 0.0) + 1.0) * _vector(weight_ptr, 0, cols, inside, 1.0)


@jit
def _stream(x_row, branch_ptr, branch_at, gate, x_new_ptr, start, cols, live):
    """Columns of x_new in float32; where there is a branch they are stored."""
    x = tl.load(x_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if branch_ptr is None:
        return x
    else:
        branch = tl.load(branch_ptr + branch_at + cols[None, :], mask=live, other=0.0).to(tl.float32)
        x_new = (x + branch * gate[None, :]).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + start + cols[None, :], x_new, mask=live)
        return x_new.to(tl.float32)


@jit
def _norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
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
    shift = _vector(shift_ptr, sample * stride_shift, cols, None, 0.0)
    factor = _factor(scale_ptr, sample * stride_scale, weight_ptr, cols, None)
    gate = _vector(gate_ptr, sample * stride_gate, cols, None, 1.0)
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_shift = _vector(shift_ptr, sample * stride_shift, tail_cols, tail_in, 0.0)
        tail_factor = _factor(scale_ptr, sample * stride_scale, weight_ptr, tail_cols, tail_in)
        tail_gate = _vector(gate_ptr, sample * stride_gate, tail_cols, tail_in, 1.0)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        row64 = row.to(tl.int64)[:, None]
        live = row < T
        start = (sample * T + row64) * D
        x_row = x_ptr + sample * stride_xb + row64 * stride_xt
        branch_at = sample * stride_branch_b + row64 * stride_branch_t
        x = _stream(x_row, branch_ptr, branch_at, gate, x_new_ptr, start, cols, live[:, None])
        total = tl.sum(x, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_x = _stream(x_row, branch_ptr, branch_at, tail_gate, x_new_ptr, start, tail_cols, tail_live)
            total += tl.sum(tail_x, 1)
        if mean_ptr is not None:
            mean = total / D
            tl.store(mean_ptr + sample * T + row, mean, mask=live)
            x = x - mean[:, None]
            if TAIL:
                tail_x = tl.where(tail_live, tail_x - mean[:, None], 0.0)
        square = tl.sum(x * x, 1)
        if TAIL:
            square += tl.sum(tail_x * tail_x, 1)
        rstd = 1.0 / tl.sqrt(square / D + eps)
        # Squares beyond fp32's range would make it 0 and y the shift, as if nothing were wrong.
        rstd = tl.where(rstd == 0.0, float("nan"), rstd)
        tl.store(rstd_ptr + sample * T + row, rstd, mask=live)

        y = x * rstd[:, None] * factor[None, :] + shift[None, :]
        tl.store(y_ptr + start + cols[None, :], y, mask=live[:, None])
        if TAIL:
            tail_y = tail_x * rstd[:, None] * tail_factor[None, :] + tail_shift[None, :]
            tl.store(y_ptr + start + tail_cols[None, :], tail_y, mask=tail_live)


@jit
def _normalized(x_row, dy_row, mean, rstd, factor, cols, live):
    """Columns of n, dy and g."""
    n = tl.load(x_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
    n = (n - mean[:, None]) * rstd[:, None]
    dy = tl.load(dy_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
    return n, dy, dy * factor[None, :]


@jit
def _store_gradients(dx, dx_new_ptr, dx_new_at, branch_ptr, branch_at, gate, dx_ptr, dbranch_ptr, start, cols, live):
    """Store columns of dx, dx_new added, and of dbranch; the rows' sum for dgate."""
    if dx_new_ptr is not None:
        dx += tl.load(dx_new_ptr + dx_new_at + cols[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(dx_ptr + start + cols[None, :], dx, mask=live)
    dgate = tl.zeros(cols.shape, tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + branch_at + cols[None, :], mask=live, other=0.0).to(tl.float32)
        dgate = tl.sum(branch * dx, 0)
    if dbranch_ptr is not None:
        tl.store(dbranch_ptr + start + cols[None, :], dx * gate[None, :], mask=live)
    return dgate


@jit
def _norm_bwd_kernel(
    dy_ptr,
    dx_new_ptr,
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    partial_ptr,
    T,
    chunks,
    stride_dyb,
    stride_dyt,
    stride_dx_new_b,
    stride_dx_new_t,
    stride_xb,
    stride_xt,
    stride_branch_b,
    stride_branch_t,
    stride_gate,
    stride_scale,
    DSHIFT: tl.constexpr,
    DFACTOR: tl.constexpr,
    DGATE: tl.constexpr,
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
    factor = _factor(scale_ptr, sample * stride_scale, weight_ptr, cols, None)
    gate = _vector(gate_ptr, sample * stride_gate, cols, None, 1.0)
    dshift = tl.zeros([MAIN], tl.float32)
    dfactor = tl.zeros([MAIN], tl.float32)
    dgate = tl.zeros([MAIN], tl.float32)
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_factor = _factor(scale_ptr, sample * stride_scale, weight_ptr, tail_cols, tail_in)
        tail_gate = _vector(gate_ptr, sample * stride_gate, tail_cols, tail_in, 1.0)
        tail_dshift = tl.zeros([TAIL], tl.float32)
        tail_dfactor = tl.zeros([TAIL], tl.float32)
        tail_dgate = tl.zeros([TAIL], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        row64 = row.to(tl.int64)[:, None]
        live = row < T
        start = (sample * T + row64) * D
        # Of an op with a branch x_new is what the forward wrote, and so is contiguous.
        x_row = x_new_ptr + (sample * stride_xb + row64 * stride_xt if dbranch_ptr is None else start)
        dy_row = dy_ptr + sample * stride_dyb + row64 * stride_dyt
        dx_new_at = sample * stride_dx_new_b + row64 * stride_dx_new_t
        branch_at = sample * stride_branch_b + row64 * stride_branch_t
        mean = _vector(mean_ptr, sample * T, row, live, 0.0)
        rstd = _vector(rstd_ptr, sample * T, row, live, 0.0)

        n, dy, g = _normalized(x_row, dy_row, mean, rstd, factor, cols, live[:, None])
        dshift += tl.sum(dy, 0)
        dfactor += tl.sum(dy * n, 0)
        g_mean = tl.sum(g, 1)
        gn_mean = tl.sum(g * n, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_n, tail_dy, tail_g = _normalized(x_row, dy_row, mean, rstd, tail_factor, tail_cols, tail_live)
            tail_dshift += tl.sum(tail_dy, 0)
            tail_dfactor += tl.sum(tail_dy * tail_n, 0)
            g_mean += tl.sum(tail_g, 1)
            gn_mean += tl.sum(tail_g * tail_n, 1)
        g_mean = (g_mean / D)[:, None]
        gn_mean = (gn_mean / D)[:, None]
        if mean_ptr is not None:
            g = g - g_mean
            if TAIL:
                tail_g = tail_g - g_mean

        dx = (g - n * gn_mean) * rstd[:, None]
        dgate += _store_gradients(
            *(dx, dx_new_ptr, dx_new_at, branch_ptr, branch_at, gate, dx_ptr, dbranch_ptr, start, cols, live[:, None])
        )
        if TAIL:
            tail_dx = (tail_g - tail_n * gn_mean) * rstd[:, None]
            tail_dgate += _store_gradients(
                *(tail_dx, dx_new_ptr, dx_new_at, branch_ptr, branch_at, tail_gate),
                *(dx_ptr, dbranch_ptr, start, tail_cols, tail_live),
            )

    if partial_ptr is not None:
        partial = partial_ptr + pid.to(tl.int64) * ((DSHIFT + DFACTOR + DGATE) * D)
        if DSHIFT:
            tl.store(partial + cols, dshift)
            if TAIL:
                tl.store(partial + tail_cols, tail_dshift, mask=tail_in)
            partial += D
        if DFACTOR:
            tl.store(partial + cols, dfactor)
            if TAIL:
                tl.store(partial + tail_cols, tail_dfactor, mask=tail_in)
            partial += D
        if DGATE:
            tl.store(partial + cols, dgate)
            if TAIL:
                tl.store(partial + tail_cols, tail_dgate, mask=tail_in)


def norm_ref(x: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """n in plain PyTorch, in x's dtype."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    # A view, so that the gradients of the several uses that PyTorch's RMSNorm makes of x are added up before those of
    # other users of x, in whatever order a recompute policy runs them.
    return F.rms_norm(x.view_as(x), x.shape[-1:], eps=eps)


def check_norm(op: str, norm: str) -> None:
    """ValueError for a norm that is not one of NORMS."""
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}, expected one of {', '.join(map(repr, NORMS))}")


def norm_empty(x: torch.Tensor, norm: str, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean (empty where the norm has none) and rstd, not yet written."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in (x.shape[:2] if norm == "layer" else (0,), x.shape[:2])
    )
    return y, mean, rstd


def norm_fwd(
    op: str,
    configs: Configs,
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    norm: str,
    added: Sequence[torch.dtype | None] | None = None,
) -> None:
    """Write the results (x_new if there is a branch, y, mean, rstd); `added` are dtypes of branch and gate in x."""
    x_new, y, mean, rstd = results if branch is not None else (None, *results)
    B, T, _ = x.shape
    added = added or [None if t is None else t.dtype for t in (branch, gate)]
    facts = (x.dtype, *added, shift, scale, weight, results[-3].dtype, norm)
    chunks, meta = tiling(op, "fwd", configs, x.shape, *facts)
    tensors, strides = laid_out((x, 3), (branch, 3), (gate, 2), (shift, 2), (scale, 2), (weight, 1))
    args = (*tensors, x_new, y, mean if norm == "layer" else None, rstd, T, chunks, eps, *strides)
    launch(_norm_fwd_kernel, B * chunks, *args, **meta)


def norm_bwd(
    op: str,
    configs: Configs,
    grads: tuple[torch.Tensor, ...],
    dx_new: torch.Tensor | None,
    dy: torch.Tensor,
    x_new: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    norm: str,
) -> None:
    """Write the gradients of x, branch and gate (if there is a branch), shift, scale and weight."""
    all_grads: tuple[Any, ...] = grads if branch is not None else (grads[0], None, None, *grads[1:])
    dx, dbranch, dgate, dshift, dscale, dweight = all_grads
    B, T, D = x_new.shape
    facts = (x_new.dtype, branch, gate, shift, scale, weight, dy.dtype, norm)
    chunks, meta = tiling(op, "bwd", configs, x_new.shape, *facts)
    kept = None if gate is None else branch
    x_new = x_new if branch is None else x_new.contiguous()
    given = ((dy, 3), (dx_new, 3), (x_new, 3), (kept, 3), (gate, 2), (scale, 2), (weight, 1))
    tensors, strides = laid_out(*given)
    # One sum serves scale and weight: each of their gradients is it times the other factor.
    dfactor = dscale if weight is None else torch.empty((B, D), dtype=torch.float32, device=dy.device)
    sums = {
        "DSHIFT": None if shift is None else dshift,
        "DFACTOR": None if scale is None and weight is None else dfactor,
        "DGATE": None if gate is None else dgate,
    }
    outs = [out for out in sums.values() if out is not None]
    partial = empty_partials(B, chunks, len(outs), D, dy.device) if outs else None
    args = (*tensors, mean if norm == "layer" else None, rstd, dx, dbranch, partial, T, chunks, *strides)
    flags = {flag: out is not None for flag, out in sums.items()}
    launch(_norm_bwd_kernel, B * chunks, *args, **flags, **meta)
    if partial is not None:
        sum_partials(partial, *outs)
    if weight is not None:
        dweight.copy_((dfactor if scale is None else dfactor + dfactor * scale).sum(0))
        if scale is not None:
            dscale.copy_(dfactor * weight)


def norm_cases() -> tuple[Case, ...]:
    """The cases of an op with a modulated norm."""
    sizes = {"B": 5, "T": 63, "D": 48}
    rms = {"norm": "rms"}
    return (
        Case("rms_weight", sizes, rms | {"eps": 0.1}),
        *(replace(case, absent=("weight",)) for case in token_cases()),
        Case("weight", sizes),
        Case("rms", {"B": 2, "T": 17, "D": 1152}, rms, absent=("weight",)),
        Case("official", {"B": 3, "T": 18, "D": 96}, mixed=True, absent=("weight",), dtypes=("out_dtype",)),
        Case("rms_official", {"B": 2, "T": 17, "D": 1152}, rms, mixed=True, dtypes=("out_dtype",)),
        Case("rms_mixed_strided", {"B": 3, "T": 18, "D": 72}, rms, mixed=True, strided=True),
        Case("rms_no_shift", sizes, rms, absent=("shift",)),
        Case("rms_no_scale", sizes, rms, absent=("scale",)),
        Case("rms_no_modulation", sizes, rms, absent=("shift", "scale")),
        Case("no_vectors", sizes, absent=("shift", "scale", "weight")),
        Case("rms_empty", {"B": 0, "T": 4, "D": 32}, rms),
        Case("rms_no_tokens", {"B": 2, "T": 0, "D": 32}, rms, full=True),
        Case("rms_widest", {"B": 2, "T": 3, "D": 8192}, rms, full=True),
    )


# LightningDiT and LargeDiT have RMSNorm with a weight.
NORM_BENCH = (
    Case("DiT-XL/2", XL_SIZES, absent=("weight",)),
    Case("DiT-XL/2 official", XL_SIZES, mixed=True, absent=("weight",), dtypes=("out_dtype",)),
    Case("LightningDiT-XL", XL_SIZES, {"norm": "rms"}),
    Case("LargeDiT-3B", XL_SIZES | {"D": 3072}, {"norm": "rms"}),
    Case("LargeDiT-3B official", XL_SIZES | {"D": 3072}, {"norm": "rms"}, mixed=True, dtypes=("out_dtype",)),
)
