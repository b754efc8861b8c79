"""x_new = x + gate * branch: the gated residual of adaLN-Zero (DiT, arXiv:2212.09748, section 3.2).

With sums over T: dx = dx_new,  dbranch = gate * dx_new,  dgate = sum(branch * dx_new).

x       (B, T, D), the residual stream, batch and row strides free, the last dim dense (else it is copied)
branch  (B, T, D), likewise; dx_new too
gate    (B, D), row stride free: a view from chunk(6) is read in place; None for a plain residual
x_new   (B, T, D), contiguous, in x's dtype
dtypes  float32, bfloat16, float16, each tensor its own; any D
fp32    all arithmetic and the partial sums of dgate: one rounding per stored value
saved   branch and gate; nothing where there is no gate

The backward reads dx_new and branch once, and hands dx_new on as dx. A program owns some columns of a chunk of rows
inside one sample, keeps dgate in registers and writes one partial row, which _rows.py adds up.
"""

import torch

from ._checks import check_dims, check_floating
from ._op import Kernels, Op
from ._rows import block_tiling, empty_partials, laid_out, sum_partials
from ._triton import jit, launch, tl
from .autotune import pick
from .spec import XL_CASES, Case, OpSpec, token_cases

DIMS = {"x": "B T D", "branch": "B T D", "gate": "B D"}

# (rows of a tile, columns of a tile, rows of a program, warps). Not measured on a chip yet; chosen so that
# - no lane idles at the widths of DiT, all multiples of 128, and a row of a tile is two lines of 128 bytes in bf16;
# - a thread holds 16 elements of each tensor: two loads of 16 bytes in flight for each;
# - 64 rows share one partial row of dgate: 8 bytes per 64 x 6 in bf16, 2 % more.
FWD_CONFIG = (16, 128, 64, 4)
BWD_CONFIG = (16, 128, 64, 4)


def gate_residual_ref(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The equation in plain PyTorch: gate * branch rounds in the branch's dtype, as under the official autocast."""
    return (x + (branch if gate is None else gate.unsqueeze(1) * branch)).to(x.dtype)


@jit
def _gate_residual_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    x_new_ptr,
    T,
    chunks,
    stride_xb,
    stride_xt,
    stride_branch_b,
    stride_branch_t,
    stride_gate,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    chunk = pid // blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * ROWS
    cols = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        row64 = row.to(tl.int64)[:, None]
        live = (row < T)[:, None] & inside[None, :]
        x_row = x_ptr + sample * stride_xb + row64 * stride_xt
        branch_row = branch_ptr + sample * stride_branch_b + row64 * stride_branch_t
        x = tl.load(x_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
        branch = tl.load(branch_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            branch = branch * gate[None, :]
        tl.store(x_new_ptr + (sample * T + row64) * D + cols[None, :], x + branch, mask=live)


@jit
def _gate_residual_bwd_kernel(
    dx_new_ptr,
    branch_ptr,
    gate_ptr,
    dbranch_ptr,
    partial_ptr,
    T,
    chunks,
    stride_dx_new_b,
    stride_dx_new_t,
    stride_branch_b,
    stride_branch_t,
    stride_gate,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    chunk = pid // blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * ROWS
    cols = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros([BLOCK_D], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        row = t + tl.arange(0, BLOCK_T)
        row64 = row.to(tl.int64)[:, None]
        live = (row < T)[:, None] & inside[None, :]
        dx_new_row = dx_new_ptr + sample * stride_dx_new_b + row64 * stride_dx_new_t
        dbranch = tl.load(dx_new_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            branch_row = branch_ptr + sample * stride_branch_b + row64 * stride_branch_t
            branch = tl.load(branch_row + cols[None, :], mask=live, other=0.0).to(tl.float32)
            dgate += tl.sum(dbranch * branch, 0)
            dbranch = dbranch * gate[None, :]
        tl.store(dbranch_ptr + (sample * T + row64) * D + cols[None, :], dbranch, mask=live)

    if gate_ptr is not None:
        tl.store(partial_ptr + chunk.to(tl.int64) * D + cols, dgate, mask=inside)


def _gate_residual_empty(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """x_new, not yet written."""
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def _gate_residual_fwd(
    results: tuple[torch.Tensor, ...], x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None
) -> None:
    chunks, programs, meta = block_tiling(pick("gate_residual_fwd", FWD_CONFIG, x, branch, gate), *x.shape)
    tensors, strides = laid_out((x, 3), (branch, 3), (gate, 2))
    launch(_gate_residual_fwd_kernel, programs, *tensors, *results, x.shape[1], chunks, *strides, **meta)


def _gate_residual_bwd(
    grads: tuple[torch.Tensor, ...], dx_new: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None
) -> None:
    dbranch, dgate = grads
    B, T, D = branch.shape
    chunks, programs, meta = block_tiling(pick("gate_residual_bwd", BWD_CONFIG, dx_new, branch, gate), B, T, D)
    tensors, strides = laid_out((dx_new, 3), (None if gate is None else branch, 3), (gate, 2))
    partial = None if gate is None else empty_partials(B, chunks, 1, D, dx_new.device)
    launch(_gate_residual_bwd_kernel, programs, *tensors, dbranch, partial, T, chunks, *strides, **meta)
    if partial is not None:
        sum_partials(partial, dgate)


_OP = Op(
    "gate_residual",
    gate_residual_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor branch, Tensor? gate",
        attrs="",
        outputs=("x_new",),
        saved=(),
        empty=_gate_residual_empty,
        fwd=_gate_residual_fwd,
        bwd=_gate_residual_bwd,
        through={"x": "x_new"},
        unread_without={"branch": "gate"},
    ),
)


def gate_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, *, backend: str = "auto"
) -> torch.Tensor:
    """x + gate * branch (B, T, D) in x's dtype, for x and branch (B, T, D) and gate (B, D) or None (a gate of one).

    ValueError for shapes that disagree or dtypes that are not floating; BackendError where the backend cannot run.
    """
    tensors = {"x": x, "branch": branch, "gate": gate}
    check_dims(_OP.name, DIMS, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x, branch, gate))


SPEC = OpSpec(
    op=_OP,
    fn=gate_residual,
    dims=DIMS,
    cases=(*token_cases(), Case("no_gate", {"B": 5, "T": 63, "D": 48}, absent=("gate",))),
    bench=XL_CASES,
    stream=("x",),
    optional=("gate",),
    shard=("B", "T"),
    recompute=("x_new",),
)
