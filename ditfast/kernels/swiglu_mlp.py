"""y = (silu(h w1^T + b1) * (h w3^T + b3)) w2^T + b2: the gated MLP of LightningDiT and LargeDiT (arXiv:2002.05202).

With gate = h w1^T + b1, up = h w3^T + b3, act = silu(gate) * up, dact = dy w2 and sums over tokens:
dgate = dact * up * silu'(gate),  dup = dact * silu(gate),  dh = dgate w1 + dup w3,  dw1 = dgate^T h,  dw3 = dup^T h,
db1 = sum(dgate),  db3 = sum(dup),  dw2 = dy^T act,  db2 = sum(dy).

h        (..., D), any leading dims; a view where its tokens are rows of one matrix, else it is copied; dy likewise
w1, w3   (F, D), as of nn.Linear, any strides: halves of a packed (2 F, D) weight are read in place
w2       (D, F)
b1, b3   (F), b2 (D), each may be None; LightningDiT has them, LargeDiT does not
y        (..., D), contiguous, in the dtype computed in
dtypes   float32, bfloat16, float16, each tensor its own; any D and F. The GEMMs compute in autocast's dtype, else in
         the widest that comes; gradients are of their inputs' dtypes, weights that are cast are graded as they came
fp32     the sums of the GEMMs and everything between them: one rounding per stored value
saved    the inputs, gate and up (tokens, F); with recompute=True the inputs alone, gate and up are computed once more

Backends as in gelu_mlp.py: triton has everything elementwise in epilogues, gemm in swiglu_backward.py's pass. "auto"
takes gemm on a GPU, which is to be measured, and reference on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ._activations import silu_and_slope
from ._checks import check_dims, check_flag, check_floating, check_not_empty
from ._gemm import gemm, halves, library_on_gpu, linear_dtype, matrix, multiply, operands, programs, tile_at, tiles_for
from ._op import Kernels, Op
from ._rows import column_sums, empty_partials, sum_partials
from ._triton import capability, jit, launch, tl
from .peers import liger_swiglu_mlp, xformers_swiglu_mlp
from .spec import Case, OpSpec
from .swiglu_backward import swiglu_backward, swiglu_pass

DIMS = {"h": "... D", "w1": "F D", "w3": "F D", "w2": "D F", "b1": "F", "b3": "F", "b2": "D"}


def swiglu_mlp_ref(
    h: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b3: torch.Tensor | None,
    b2: torch.Tensor | None,
    compute: torch.dtype,
    recompute: bool,
) -> torch.Tensor:
    """The equation in plain PyTorch."""

    def mlp(*tensors: torch.Tensor | None) -> torch.Tensor:
        h, w1, w3, w2, b1, b3, b2 = _cast(tensors, compute)
        return F.linear(F.silu(F.linear(h, w1, b1)) * F.linear(h, w3, b3), w2, b2)

    if recompute and torch.is_grad_enabled():
        return checkpoint(mlp, h, w1, w3, w2, b1, b3, b2, use_reentrant=False, preserve_rng_state=False)
    return mlp(h, w1, w3, w2, b1, b3, b2)


def _cast(tensors: Any, dtype: torch.dtype) -> Any:
    """The tensors in dtype; None stays."""
    return (None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _Gemm(torch.autograd.Function):
    """The library form, of PyTorch's own ops, so that torch.compile, DTensor and FLOP counters see through it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        *tensors, compute, recompute = args
        with torch.autocast(tensors[0].device.type, enabled=False):
            h, w1, w3, w2, b1, b3, b2 = _cast(tensors, compute)
            gate, up = F.linear(h, w1, b1), F.linear(h, w3, b3)
            y = F.linear(F.silu(gate) * up, w2, b2)
        ctx.save_for_backward(*tensors, *((None, None) if recompute else (gate, up)))
        ctx.compute = compute
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        *tensors, gate, up = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            h, w1, w3, w2, b1, b3, _ = _cast(tensors, ctx.compute)
            h, dy = matrix(h), matrix(dy)
            nothing: Any = None
            act = dgate = dup = db1 = db3 = nothing
            if any(wanted[:6]):
                kept = (gate, up) if gate is not None else (F.linear(h, w1, b1), F.linear(h, w3, b3))
                gate, up = map(matrix, kept)
                passed = any((*wanted[:3], *wanted[4:6]))
                act = dy @ w2 if passed else torch.empty_like(gate)
                dgate, dup = (torch.empty_like(gate) if passed else None for _ in range(2))
                db1, db3 = (torch.empty_like(b) if want else None for b, want in ((b1, wanted[4]), (b3, wanted[5])))
                swiglu_backward(act, gate, up, dgate, dup, db1, db3)
            grads = (
                torch.addmm(dgate @ w1, dup, w3).view(tensors[0].shape) if wanted[0] else None,
                dgate.T @ h if wanted[1] else None,
                dup.T @ h if wanted[2] else None,
                dy.T @ act if wanted[3] else None,
                db1,
                db3,
                dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if wanted[6] else None,
            )
        pairs = zip(grads, tensors, strict=True)
        return *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs), None, None


@jit
def _swiglu_mlp_fwd_kernel(
    act_ptr,
    gate_ptr,
    up_ptr,
    bias1_ptr,
    bias3_ptr,
    M,
    N,
    K,
    stride_bias1,
    stride_bias3,
    a,
    stride_am,
    stride_ak,
    b1,
    stride_b1k,
    stride_b1n,
    a_again,
    stride_a_again_m,
    stride_a_again_k,
    b3,
    stride_b3k,
    stride_b3n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m0, n0 = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gates = multiply(
            *(gates, a, b1, m0, n0, M, N, K, stride_am, stride_ak, stride_b1k, stride_b1n),
            *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
        )
        ups = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        ups = multiply(
            *(ups, a, b3, m0, n0, M, N, K, stride_am, stride_ak, stride_b3k, stride_b3n),
            *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
        )
        left_gate, right_gate = halves(gates)
        left_up, right_up = halves(ups)
        m, above = m0 + tl.arange(0, BLOCK_M), tl.cast(m0, tl.int64) * N
        for half in tl.static_range(2):
            n = n0 + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            at, live = (m - m0)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
            gate, up = left_gate if half == 0 else right_gate, left_up if half == 0 else right_up
            if bias1_ptr is not None:
                bias1 = tl.load(bias1_ptr + n.to(tl.int64) * stride_bias1, mask=n < N, other=0.0)
                gate += bias1.to(tl.float32)[None, :]
            if bias3_ptr is not None:
                bias3 = tl.load(bias3_ptr + n.to(tl.int64) * stride_bias3, mask=n < N, other=0.0)
                up += bias3.to(tl.float32)[None, :]
            if gate_ptr is not None:
                tl.store(gate_ptr + above + at, gate, mask=live)
                tl.store(up_ptr + above + at, up, mask=live)
            tl.store(act_ptr + above + at, gate * tl.sigmoid(gate) * up, mask=live)


@jit
def _swiglu_mlp_bwd_kernel(
    dgate_ptr,
    dup_ptr,
    act_ptr,
    gate_ptr,
    up_ptr,
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
            dact = left if half == 0 else right
            at, live = (m - m0)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
            up = tl.load(up_ptr + above + at, mask=live, other=0.0).to(tl.float32)
            act, slope = silu_and_slope(tl.load(gate_ptr + above + at, mask=live, other=0.0).to(tl.float32))
            if act_ptr is not None:
                tl.store(act_ptr + above + at, act * up, mask=live)
            # Rows beyond M are zeros of A, and add nothing.
            dgate, dup = dact * up * slope, dact * act
            tl.store(dgate_ptr + above + at, dgate, mask=live)
            tl.store(dup_ptr + above + at, dup, mask=live)
            if partial_ptr is not None:
                sums_ptr = partial_ptr + (m0 // BLOCK_M).to(tl.int64) * (2 * N) + n
                tl.store(sums_ptr, tl.sum(dgate, 0), mask=n < N)
                tl.store(sums_ptr + N, tl.sum(dup, 0), mask=n < N)


def _swiglu_mlp_empty(
    h: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b3: torch.Tensor | None,
    b2: torch.Tensor | None,
    compute: torch.dtype,
    recompute: bool,
) -> tuple[torch.Tensor, ...]:
    """y, gate and up, not yet written; of gate and up nothing where they are not kept."""
    kept = 0 if recompute else h.shape[:-1].numel()
    return h.new_empty(h.shape, dtype=compute), *(h.new_empty((kept, w1.shape[0]), dtype=compute) for _ in range(2))


def _swiglu_mlp_fwd(
    results: tuple[torch.Tensor, ...],
    h: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b3: torch.Tensor | None,
    b2: torch.Tensor | None,
    compute: torch.dtype,
    recompute: bool,
) -> None:
    y, gate, up = results
    rows, (w1, w3, w2) = matrix(h, compute), _cast((w1, w3, w2), compute)
    (M, K), N = rows.shape, w1.shape[0]
    act = h.new_empty((M, N), dtype=compute)
    pairs = (rows, w1.T), (rows, w3.T)
    # On sm_100 the two sums of a square tile spill under Triton 3.6.
    further = 2 if capability(h.device) >= 100 else 1
    tiles = tiles_for(M, N, rows, w1.T, rows, w3.T, further=further, kernel="swiglu_mlp_fwd")
    args, meta = operands(tiles, *pairs)
    kept = (None, None) if recompute else (gate, up)
    args = [act, *kept, b1, b3, M, N, K, *(0 if b is None else b.stride(0) for b in (b1, b3)), *args]
    launch(_swiglu_mlp_fwd_kernel, programs(tiles, M, N, h.device), *args, **meta)
    gemm(matrix(y), (act, w2.T), bias=b2)


def _swiglu_mlp_bwd(
    grads: tuple[torch.Tensor | None, ...],
    dy: torch.Tensor,
    h: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b3: torch.Tensor | None,
    b2: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    compute: torch.dtype,
    recompute: bool,
) -> None:
    dh, dw1, dw3, dw2, db1, db3, db2 = grads
    dy, rows, (w1, w3, w2) = matrix(dy), matrix(h, compute), _cast((w1, w3, w2), compute)
    (M, K), N = dy.shape, w1.shape[0]
    if b2 is not None and db2 is not None:
        column_sums(dy, db2)
    if all(grad is None for grad in grads[:6]):
        return
    if recompute:
        gate, up = (h.new_empty((M, N), dtype=compute) for _ in range(2))
        gemm(gate, (rows, w1.T), bias=b1)
        gemm(up, (rows, w3.T), bias=b3)
    act: Any = None if dw2 is None else torch.empty_like(gate)
    biases = [None if b is None else db for b, db in ((b1, db1), (b3, db3))]
    if dw2 is not None and all(grad is None for grad in (dh, dw1, dw3, *biases)):
        swiglu_pass(act, gate, up, None, None, None, None)
        gemm(dw2, (dy.T, act))
        return
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    tiles = tiles_for(M, N, dy, w2, further=2, kernel="swiglu_mlp_bwd")
    partial = empty_partials(1, -(-M // tiles.m), 2, N, h.device) if any(db is not None for db in biases) else None
    args, meta = operands(tiles, (dy, w2))
    args = [dgate, dup, act, gate, up, partial, M, N, K, *args]
    launch(_swiglu_mlp_bwd_kernel, programs(tiles, M, N, h.device), *args, **meta)
    if partial is not None:
        unwanted = partial.new_empty((1, N))
        sum_partials(partial, *(unwanted if db is None else db.view(1, N) for db in biases))
    if dh is not None:
        gemm(matrix(dh), (dgate, w1), (dup, w3))
    for dw, side, other in ((dw1, dgate, rows), (dw3, dup, rows), (dw2, dy, act)):
        if dw is not None:
            gemm(dw, (side.T, other))


_OP = Op(
    "swiglu_mlp",
    swiglu_mlp_ref,
    {"gemm": _Gemm.apply},
    kernels=Kernels(
        inputs="Tensor h, Tensor w1, Tensor w3, Tensor w2, Tensor? b1, Tensor? b3, Tensor? b2",
        attrs="ScalarType compute, bool recompute",
        outputs=("y",),
        saved=("gate", "up"),
        empty=_swiglu_mlp_empty,
        fwd=_swiglu_mlp_fwd,
        bwd=_swiglu_mlp_bwd,
        skips=("h", "w1", "w3", "w2", "b1", "b3", "b2"),
    ),
    auto=library_on_gpu,
)


def swiglu_mlp(
    h: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    recompute: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y (..., D) of h (..., D), w1 (gate) and w3 (F, D), w2 (D, F), b1 and b3 (F), b2 (D) or None.

    recompute keeps nothing for the backward but the inputs; reference then redoes all GEMMs, the others w1's and w3's.
    ValueError for shapes that disagree, a D or F of 0, or dtypes that are not floating; BackendError where the backend
    cannot run.
    """
    tensors = dict(zip(DIMS, (h, w1, w3, w2, b1, b3, b2), strict=True))
    check_not_empty(_OP.name, check_dims(_OP.name, DIMS, tensors, _OP.optional), "D", "F")
    check_floating(_OP.name, tensors)
    check_flag(_OP.name, "recompute", recompute)
    given = [tensor for tensor in (w1, w3, w2, b1, b3, b2) if tensor is not None]
    # Without gradients nothing is kept, and gate and up need not be written.
    compute, recompute = linear_dtype(h, *given), recompute or not torch.is_grad_enabled()
    return _OP(backend, tuple(tensors.values()), (compute, recompute))


_BIASES = ("b1", "b3", "b2")
_LIGHTNING = {"B": 256, "T": 256, "D": 1152, "F": 3072}
_LARGE = {"B": 256, "T": 256, "D": 3072, "F": 8192}

SPEC = OpSpec(
    op=_OP,
    fn=swiglu_mlp,
    dims=DIMS | {"h": "B T D"},
    cases=(
        Case("odd", {"B": 3, "T": 7, "D": 25, "F": 40}),
        Case("mixed", {"B": 3, "T": 7, "D": 33, "F": 70}, mixed=True),
        Case("recompute", {"B": 2, "T": 35, "D": 48, "F": 72}, {"recompute": True}),
        Case("strided", {"B": 2, "T": 5, "D": 16, "F": 64}, strided=True),
        Case("no_biases", {"B": 2, "T": 5, "D": 24, "F": 40}, absent=_BIASES),
        Case("tiles", {"B": 2, "T": 67, "D": 72, "F": 136}),
        Case("empty", {"B": 0, "T": 5, "D": 16, "F": 64}),
    ),
    bench=(
        Case("LightningDiT-XL", _LIGHTNING),
        Case("LightningDiT-XL recompute", _LIGHTNING, {"recompute": True}),
        Case("LargeDiT-3B", _LARGE, absent=_BIASES),
    ),
    stream=("h",),
    optional=_BIASES,
    traffic=(Case("256 tokens, D 256", {"B": 2, "T": 128, "D": 256, "F": 768}),),
    # As gelu_mlp's.
    limits={"requested": 4.4, "unique": 2.2},
    flops=lambda inputs: 6 * inputs["h"].numel() * inputs["w1"].shape[0],
    shard=("B", "T"),
    peers={"liger-kernel": liger_swiglu_mlp, "xformers": xformers_swiglu_mlp},
)
