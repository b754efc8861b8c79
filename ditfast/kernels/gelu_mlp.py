"""y = gelu(h w1^T + b1) w2^T + b2 with the tanh approximation of GELU (arXiv:1606.08415): the MLP of a block.

With pre = h w1^T + b1, act = gelu(pre), dpre = (dy w2) * gelu'(pre) and sums over tokens:
dh = dpre w1,  dw1 = dpre^T h,  db1 = sum(dpre),  dw2 = dy^T act,  db2 = sum(dy).

h       (..., D), any leading dims; a view where its tokens are rows of one matrix, else it is copied; dy likewise
w1, b1  (F, D), (F), as of nn.Linear, any strides
w2, b2  (D, F), (D)
y       (..., D), contiguous, in the dtype computed in
dtypes  float32, bfloat16, float16, each tensor its own; any D and F. The GEMMs compute in autocast's dtype, else in the
        widest that comes; gradients are of their inputs' dtypes, weights that are cast are graded as they came
fp32    the sums of the GEMMs and everything between them: one rounding per stored value
saved   the inputs and pre (tokens, F); with recompute=True the inputs alone, and pre is computed once more

triton  bias and GELU are the epilogue of fc1's GEMM, gelu' and the sums of db1 that of dy w2's: beside their operands
        the GEMMs move 3 F elements a token (pre twice, act once more)
gemm    the library's GEMMs, and gelu_backward.py's pass: 6 F, as PyTorch's own form, which keeps F more
Which is faster on a GPU is to be measured; until then "auto" takes gemm there. On a CPU it takes reference: PyTorch's
own form keeps act, so that gemm computes one GELU more, and was up to 10 % slower.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ._activations import gelu, gelu_and_slope
from ._checks import check_dims, check_flag, check_floating, check_not_empty
from ._gemm import gemm, halves, library_on_gpu, linear_dtype, matrix, multiply, operands, programs, tile_at, tiles_for
from ._op import Kernels, Op
from ._rows import column_sums, empty_partials, sum_partials
from ._triton import jit, launch, tl
from .gelu_backward import gelu_backward, gelu_pass
from .peers import apex_gelu_mlp, diffusers_gelu_mlp, flash_attn_gelu_mlp
from .spec import Case, OpSpec

DIMS = {"h": "... D", "w1": "F D", "b1": "F", "w2": "D F", "b2": "D"}


def gelu_mlp_ref(
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    compute: torch.dtype,
    recompute: bool,
) -> torch.Tensor:
    """The equation in plain PyTorch."""

    def mlp(*tensors: torch.Tensor) -> torch.Tensor:
        h, w1, b1, w2, b2 = (tensor.to(compute) for tensor in tensors)
        return F.linear(F.gelu(F.linear(h, w1, b1), approximate="tanh"), w2, b2)

    if recompute and torch.is_grad_enabled():
        return checkpoint(mlp, h, w1, b1, w2, b2, use_reentrant=False, preserve_rng_state=False)
    return mlp(h, w1, b1, w2, b2)


class _Gemm(torch.autograd.Function):
    """The library form, of PyTorch's own ops, so that torch.compile, DTensor and FLOP counters see through it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        *tensors, compute, recompute = args
        with torch.autocast(tensors[0].device.type, enabled=False):
            h, w1, b1, w2, b2 = (tensor.to(compute) for tensor in tensors)
            pre = F.linear(h, w1, b1)
            y = F.linear(F.gelu(pre, approximate="tanh"), w2, b2)
        ctx.save_for_backward(*tensors, None if recompute else pre)
        ctx.compute = compute
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        *tensors, pre = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            h, w1, b1, w2, _ = (tensor.to(ctx.compute) for tensor in tensors)
            h, dy = matrix(h), matrix(dy)
            nothing: Any = None
            dpre = act = db1 = nothing
            if any(wanted[:4]):
                pre = F.linear(h, w1, b1) if pre is None else matrix(pre)
                dpre = dy @ w2 if any(wanted[:3]) else None
                act = torch.empty_like(pre) if wanted[3] else None
                db1 = torch.empty_like(tensors[2]) if wanted[2] else None
                gelu_backward(dpre, pre, act, db1)
            grads = (
                (dpre @ w1).view(tensors[0].shape) if wanted[0] else None,
                dpre.T @ h if wanted[1] else None,
                db1,
                dy.T @ act if wanted[3] else None,
                dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if wanted[4] else None,
            )
        return *(None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)), None, None


@jit
def _gelu_mlp_fwd_kernel(
    act_ptr,
    pre_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_bias,
    a,
    stride_am,
    stride_ak,
    b,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        m0, n0 = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            *(acc, a, b, m0, n0, M, N, K, stride_am, stride_ak, stride_bk, stride_bn),
            *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
        )
        left, right = halves(acc)
        m, above = m0 + tl.arange(0, BLOCK_M), tl.cast(m0, tl.int64) * N
        for half in tl.static_range(2):
            n = n0 + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            at, live = (m - m0)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
            bias = tl.load(bias_ptr + n.to(tl.int64) * stride_bias, mask=n < N, other=0.0).to(tl.float32)
            pre = (left if half == 0 else right) + bias[None, :]
            if pre_ptr is not None:
                tl.store(pre_ptr + above + at, pre, mask=live)
            tl.store(act_ptr + above + at, gelu(pre), mask=live)


@jit
def _gelu_mlp_bwd_kernel(
    dpre_ptr,
    act_ptr,
    pre_ptr,
    partial_ptr,
    M,
    N,
    K,
    a,
    stride_am,
    stride_ak,
    b,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        m0, n0 = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            *(acc, a, b, m0, n0, M, N, K, stride_am, stride_ak, stride_bk, stride_bn),
            *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
        )
        left, right = halves(acc)
        m, above = m0 + tl.arange(0, BLOCK_M), tl.cast(m0, tl.int64) * N
        for half in tl.static_range(2):
            n = n0 + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            at, live = (m - m0)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
            act, slope = gelu_and_slope(tl.load(pre_ptr + above + at, mask=live, other=0.0).to(tl.float32))
            if act_ptr is not None:
                tl.store(act_ptr + above + at, act, mask=live)
            # Rows beyond M are zeros of A, and add nothing.
            dpre = (left if half == 0 else right) * slope
            tl.store(dpre_ptr + above + at, dpre, mask=live)
            if partial_ptr is not None:
                sums_ptr = partial_ptr + (m0 // BLOCK_M).to(tl.int64) * N
                tl.store(sums_ptr + n, tl.sum(dpre, 0), mask=n < N)


def _gelu_mlp_empty(
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    compute: torch.dtype,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and pre, not yet written; of pre nothing where it is not kept."""
    kept = 0 if recompute else h.shape[:-1].numel()
    return h.new_empty(h.shape, dtype=compute), h.new_empty((kept, w1.shape[0]), dtype=compute)


def _gelu_mlp_fwd(
    results: tuple[torch.Tensor, ...],
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    compute: torch.dtype,
    recompute: bool,
) -> None:
    y, pre = results
    rows, w1, w2 = matrix(h, compute), w1.to(compute), w2.to(compute)
    (M, K), N = rows.shape, w1.shape[0]
    act = h.new_empty((M, N), dtype=compute)
    tiles = tiles_for(M, N, rows, w1.T, kernel="gelu_mlp_fwd")
    args, meta = operands(tiles, (rows, w1.T))
    args = [act, None if recompute else pre, b1, M, N, K, b1.stride(0), *args]
    launch(_gelu_mlp_fwd_kernel, programs(tiles, M, N, h.device), *args, **meta)
    gemm(matrix(y), (act, w2.T), bias=b2)


def _gelu_mlp_bwd(
    grads: tuple[torch.Tensor | None, ...],
    dy: torch.Tensor,
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    pre: torch.Tensor,
    compute: torch.dtype,
    recompute: bool,
) -> None:
    dh, dw1, db1, dw2, db2 = grads
    dy, rows, w1, w2 = matrix(dy), matrix(h, compute), w1.to(compute), w2.to(compute)
    (M, K), N = dy.shape, w1.shape[0]
    if db2 is not None:
        column_sums(dy, db2)
    if all(grad is None for grad in grads[:4]):
        return
    if recompute:
        pre = h.new_empty((M, N), dtype=compute)
        gemm(pre, (rows, w1.T), bias=b1)
    act: Any = None if dw2 is None else torch.empty_like(pre)
    if dw2 is not None and dh is None and dw1 is None and db1 is None:
        gelu_pass(None, pre, act, None)
        gemm(dw2, (dy.T, act))
        return
    dpre = torch.empty_like(pre)
    tiles = tiles_for(M, N, dy, w2, further=1, kernel="gelu_mlp_bwd")
    partial = None if db1 is None else empty_partials(1, -(-M // tiles.m), 1, N, h.device)
    args, meta = operands(tiles, (dy, w2))
    args = [dpre, act, pre, partial, M, N, K, *args]
    launch(_gelu_mlp_bwd_kernel, programs(tiles, M, N, h.device), *args, **meta)
    if db1 is not None and partial is not None:
        sum_partials(partial, db1.view(1, N))
    if dh is not None:
        gemm(matrix(dh), (dpre, w1))
    if dw1 is not None:
        gemm(dw1, (dpre.T, rows))
    if dw2 is not None:
        gemm(dw2, (dy.T, act))


_OP = Op(
    "gelu_mlp",
    gelu_mlp_ref,
    {"gemm": _Gemm.apply},
    kernels=Kernels(
        inputs="Tensor h, Tensor w1, Tensor b1, Tensor w2, Tensor b2",
        attrs="ScalarType compute, bool recompute",
        outputs=("y",),
        saved=("pre",),
        empty=_gelu_mlp_empty,
        fwd=_gelu_mlp_fwd,
        bwd=_gelu_mlp_bwd,
        skips=("h", "w1", "b1", "w2", "b2"),
    ),
    auto=library_on_gpu,
)


def gelu_mlp(
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    recompute: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y (..., D) of h (..., D), w1 (F, D), b1 (F), w2 (D, F), b2 (D).

    recompute keeps nothing for the backward but the inputs; reference then redoes both GEMMs, the others the first one.
    ValueError for shapes that disagree, a D or F of 0, or dtypes that are not floating; BackendError where the backend
    cannot run.
    """
    tensors = {"h": h, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    check_not_empty(_OP.name, check_dims(_OP.name, DIMS, tensors), "D", "F")
    check_floating(_OP.name, tensors)
    check_flag(_OP.name, "recompute", recompute)
    # Without gradients nothing is kept, and pre need not be written.
    compute, recompute = linear_dtype(h, w1, b1, w2, b2), recompute or not torch.is_grad_enabled()
    return _OP(backend, tuple(tensors.values()), (compute, recompute))


def _slack(inputs: Mapping[str, Any]) -> dict[str, float]:
    """How far the RMS errors of what is summed over F may exceed float32's budget.

    L terms added one after the other err by sqrt(L) of their roundings, a random walk; a CPU's library adds blocks of
    some 512 apart. The budget's factor, 2, is thus used up at L = 2048.
    """
    single = all(tensor.dtype == torch.float32 for tensor in inputs.values() if isinstance(tensor, torch.Tensor))
    longer = math.sqrt(max(1, inputs["w1"].shape[0] / 2048)) if single else 1
    return {"out0": longer, "dh": longer}


_XL = {"B": 256, "T": 256, "D": 1152, "F": 4608}

SPEC = OpSpec(
    op=_OP,
    fn=gelu_mlp,
    dims=DIMS | {"h": "B T D"},
    cases=(
        Case("odd", {"B": 3, "T": 7, "D": 25, "F": 40}),
        Case("mixed", {"B": 3, "T": 7, "D": 33, "F": 70}, mixed=True),
        Case("recompute", {"B": 2, "T": 35, "D": 48, "F": 72}, {"recompute": True}),
        Case("strided", {"B": 2, "T": 5, "D": 16, "F": 64}, strided=True),
        # More than one tile each way, by tensor cores' tiles and by float32's; K with a tail.
        Case("tiles", {"B": 2, "T": 67, "D": 72, "F": 136}),
        Case("empty", {"B": 0, "T": 5, "D": 16, "F": 64}),
        Case("xl", {"B": 2, "T": 17, "D": 1152, "F": 4608}, full=True),
    ),
    bench=(
        Case("DiT-XL/2", _XL),
        Case("DiT-XL/2 recompute", _XL, {"recompute": True}),
        Case("LargeDiT-3B", _XL | {"D": 3072, "F": 12288}),
    ),
    stream=("h",),
    # A GEMM asks the L2 for its operands once a tile, and act, pre and dpre move between launches, which the minimum
    # does not count.
    traffic=(Case("256 tokens, D 256", {"B": 2, "T": 128, "D": 256, "F": 1024}),),
    limits={"requested": 4.3, "unique": 2.3},
    flops=lambda inputs: 4 * inputs["h"].numel() * inputs["w1"].shape[0],
    shard=("B", "T"),
    peers={"apex": apex_gelu_mlp, "flash-attn": flash_attn_gelu_mlp, "diffusers": diffusers_gelu_mlp},
    slack=_slack,
)
