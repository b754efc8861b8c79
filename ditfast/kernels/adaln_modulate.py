"""y = LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters (DiT, arXiv:2212.09748, section 3.2).

n = (x - mean) * rstd, rstd = 1 / sqrt(var + eps), var biased; with g = dy * (1 + scale), means over D and sums over T:
dx = rstd * (g - mean(g) - n * mean(g * n)),  dshift = sum(dy),  dscale = sum(dy * n).

x            (B, T, D), batch and row strides free, the last dim dense (else it is copied); dy likewise
shift, scale (B, D), row stride free: views from chunk(6) are read in place; the last dim dense (else copied)
y            (B, T, D), contiguous, in out_dtype
dtypes       float32, bfloat16, float16, each tensor its own; D up to 8192
fp32         all arithmetic, mean and rstd, the partial sums of dshift and dscale: one rounding per stored value
saved        x, shift, scale (of the modulation views nothing is copied), mean and rstd (B, T) in fp32

The backward reads x and dy once. A program owns a chunk of rows inside one sample, keeps dshift and dscale in registers
and writes one partial row of each, which _rows.py adds up.
"""

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating
from ._op import Kernels, Op
from ._rows import empty_partials, sum_partials, tiling
from ._triton import jit, launch, rows, tl
from .spec import XL_CASES, OpSpec, token_cases

DIMS = {"x": "B T D", "shift": "B D", "scale": "B D"}

# (largest D, rows of a tile, rows of a program, warps). Not measured on a chip yet; chosen so that
# - a thread holds about 32 elements of a forward tile, half that of a backward tile, which keeps dy, n, g and two sums:
#   16-byte loads in flight, no spills on sm_80, sm_90 and sm_100 (at D 1152, backward tiles of 4 rows spill on sm_100);
# - forward, 8 rows or more share one read of shift and scale: at most 1/8 more bytes than the minimum asked of the L2;
# - backward, 64 rows or more share one partial row of dshift and dscale: 8 bytes per 64 x 6 in bf16, 2 % more.
FWD_CONFIGS = ((64, 32, 32, 4), (256, 16, 16, 4), (512, 8, 8, 4), (1536, 4, 8, 4), (4096, 2, 8, 8), (8192, 1, 8, 8))
BWD_CONFIGS = (
    (64, 32, 64, 4),
    (256, 16, 64, 4),
    (512, 8, 64, 4),
    (1536, 2, 64, 4),
    (4096, 1, 64, 8),
    (8192, 1, 64, 16),
)


def adaln_modulate_ref(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The equation in plain PyTorch, in the dtypes that come: 1 + scale rounds in scale's, as under autocast."""
    n = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (n * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(out_dtype or x.dtype)


@jit
def _adaln_modulate_fwd_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    chunks,
    eps,
    stride_xb,
    stride_xt,
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
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_shift = tl.load(shift_ptr + sample * stride_shift + tail_cols, mask=tail_in, other=0.0).to(tl.float32)
        tail_scale = (
            tl.load(scale_ptr + sample * stride_scale + tail_cols, mask=tail_in, other=0.0).to(tl.float32) + 1.0
        )

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        live = row < T
        x_row = x_ptr + sample * stride_xb + row.to(tl.int64)[:, None] * stride_xt
        x = tl.load(x_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        total = tl.sum(x, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_x = tl.load(x_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            total += tl.sum(tail_x, 1)
        mean = total / D
        x = x - mean[:, None]
        square = tl.sum(x * x, 1)
        if TAIL:
            tail_x = tl.where(tail_live, tail_x - mean[:, None], 0.0)
            square += tl.sum(tail_x * tail_x, 1)
        rstd = 1.0 / tl.sqrt(square / D + eps)

        out_row = sample * T + row
        tl.store(mean_ptr + out_row, mean, mask=live)
        tl.store(rstd_ptr + out_row, rstd, mask=live)
        y_row = y_ptr + out_row[:, None] * D
        y = x * rstd[:, None] * scale[None, :] + shift[None, :]
        tl.store(y_row + cols[None, :], y, mask=live[:, None])
        if TAIL:
            tail_y = tail_x * rstd[:, None] * tail_scale[None, :] + tail_shift[None, :]
            tl.store(y_row + tail_cols[None, :], tail_y, mask=tail_live)


@jit
def _adaln_modulate_bwd_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    T,
    chunks,
    stride_dyb,
    stride_dyt,
    stride_xb,
    stride_xt,
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
    scale = tl.load(scale_ptr + sample * stride_scale + cols).to(tl.float32) + 1.0
    dshift = tl.zeros([MAIN], tl.float32)
    dscale = tl.zeros([MAIN], tl.float32)
    if TAIL:
        tail_cols = MAIN + tl.arange(0, TAIL)
        tail_in = tail_cols < D
        tail_scale = (
            tl.load(scale_ptr + sample * stride_scale + tail_cols, mask=tail_in, other=0.0).to(tl.float32) + 1.0
        )
        tail_dshift = tl.zeros([TAIL], tl.float32)
        tail_dscale = tl.zeros([TAIL], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        live = row < T
        x_row = x_ptr + sample * stride_xb + row.to(tl.int64)[:, None] * stride_xt
        dy_row = dy_ptr + sample * stride_dyb + row.to(tl.int64)[:, None] * stride_dyt
        mean = tl.load(mean_ptr + sample * T + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + sample * T + row, mask=live, other=0.0)[:, None]

        n = tl.load(x_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        n = (n - mean) * rstd
        dy = tl.load(dy_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        dshift += tl.sum(dy, 0)
        dscale += tl.sum(dy * n, 0)
        g = dy * scale[None, :]
        g_mean = tl.sum(g, 1)
        gn_mean = tl.sum(g * n, 1)
        if TAIL:
            tail_live = live[:, None] & tail_in[None, :]
            tail_n = tl.load(x_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_n = (tail_n - mean) * rstd
            tail_dy = tl.load(dy_row + tail_cols[None, :], mask=tail_live, other=0.0).to(tl.float32)
            tail_dshift += tl.sum(tail_dy, 0)
            tail_dscale += tl.sum(tail_dy * tail_n, 0)
            tail_g = tail_dy * tail_scale[None, :]
            g_mean += tl.sum(tail_g, 1)
            gn_mean += tl.sum(tail_g * tail_n, 1)
        g_mean = (g_mean / D)[:, None]
        gn_mean = (gn_mean / D)[:, None]

        dx_row = dx_ptr + (sample * T + row)[:, None] * D
        tl.store(dx_row + cols[None, :], (g - g_mean - n * gn_mean) * rstd, mask=live[:, None])
        if TAIL:
            tl.store(dx_row + tail_cols[None, :], (tail_g - g_mean - tail_n * gn_mean) * rstd, mask=tail_live)

    partial = partial_ptr + pid.to(tl.int64) * (2 * D)
    tl.store(partial + cols, dshift)
    tl.store(partial + D + cols, dscale)
    if TAIL:
        tl.store(partial + tail_cols, tail_dshift, mask=tail_in)
        tl.store(partial + D + tail_cols, tail_dscale, mask=tail_in)


def _adaln_modulate_empty(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean, rstd, not yet written."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


def _adaln_modulate_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    y, mean, rstd = results
    B, T, D = x.shape
    chunks, meta = tiling(_OP.name, FWD_CONFIGS, B, T, D)
    x, shift, scale = rows(x), rows(shift), rows(scale)
    strides = (x.stride(0), x.stride(1), shift.stride(0), scale.stride(0))
    launch(_adaln_modulate_fwd_kernel, B * chunks, x, shift, scale, y, mean, rstd, T, chunks, eps, *strides, **meta)


def _adaln_modulate_bwd(
    grads: tuple[torch.Tensor, ...],
    dy: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    dx, dshift, dscale = grads
    B, T, D = x.shape
    chunks, meta = tiling(_OP.name, BWD_CONFIGS, B, T, D)
    dy, x, scale = rows(dy), rows(x), rows(scale)
    partial = empty_partials(B, chunks, 2, D, x.device)
    strides = (dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0))
    args = (dy, x, scale, mean, rstd, dx, partial, T, chunks, *strides)
    launch(_adaln_modulate_bwd_kernel, B * chunks, *args, **meta)
    sum_partials(partial, dshift, dscale)


_OP = Op(
    "adaln_modulate",
    adaln_modulate_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor shift, Tensor scale",
        attrs="float eps, ScalarType out_dtype",
        outputs=("y",),
        saved=("mean", "rstd"),
        empty=_adaln_modulate_empty,
        fwd=_adaln_modulate_fwd,
        bwd=_adaln_modulate_bwd,
    ),
)


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """y (B, T, D) = LN(x) * (1 + scale) + shift in out_dtype (x's by default); x (B, T, D), shift and scale (B, D).

    ValueError for shapes that disagree or dtypes that are not floating; BackendError where the backend cannot run.
    """
    tensors = {"x": x, "shift": shift, "scale": scale}
    check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x, shift, scale), (eps, out_dtype or x.dtype))


SPEC = OpSpec(
    op=_OP,
    fn=adaln_modulate,
    dims=DIMS,
    cases=token_cases(),
    bench=XL_CASES,
    stream=("x",),
    shard=("B", "T"),
    recompute=("y",),
    bwd_unread=("shift",),
)
