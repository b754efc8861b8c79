"""grad <- silu(gate) * up; dgate, dup and the sums of their columns: a SwiGLU's backward between a library's GEMMs.

dgate = grad * up * silu'(gate),  dup = grad * silu(gate).

grad           (M, F), the gradient of act = silu(gate) * up; in place, act, which the following weight's gradient needs
gate, up       (M, F)
dgate, dup     (M, F), written; both None where act alone is wanted: grad is then written only
dbias1, dbias3 (F), written: the sums of dgate's and dup's columns; each may be None, as they are with these
dtypes         float32, bfloat16, float16, each tensor its own; any F. All contiguous
fp32           all arithmetic and the partial sums: one rounding per stored value

One pass: 6 M F elements move.
"""

import torch
import torch.nn.functional as F

from ._activations import silu_and_slope
from ._checks import check_contiguous, check_dims, check_floating
from ._op import InPlace, Op
from ._rows import block_tiling, empty_partials, sum_partials
from ._triton import jit, launch, tl
from .autotune import pick
from .spec import Case, OpSpec

DIMS = {"grad": "M F", "gate": "M F", "up": "M F", "dgate": "M F", "dup": "M F", "dbias1": "F", "dbias3": "F"}

# (rows of a tile, columns of a tile, rows of a program, warps): as gate_residual's, for the same reasons.
CONFIG = (16, 128, 64, 4)


def swiglu_backward_ref(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    dbias1: torch.Tensor | None,
    dbias3: torch.Tensor | None,
) -> None:
    """The equation in plain PyTorch."""
    act = F.silu(gate)
    if dgate is not None and dup is not None:
        dgate.copy_(torch.ops.aten.silu_backward(grad * up, gate.to(grad.dtype)))
        dup.copy_(grad * act)
        for dbias, summed in ((dbias1, dgate), (dbias3, dup)):
            if dbias is not None:
                dbias.copy_(summed.sum(0))
    grad.copy_(act * up)


@jit
def _swiglu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    partial_ptr,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    chunk = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    dbias1 = tl.zeros([BLOCK_D], tl.float32)
    dbias3 = tl.zeros([BLOCK_D], tl.float32)
    for t in range(0, ROWS, BLOCK_T):
        row = chunk * ROWS + t + tl.arange(0, BLOCK_T)
        live = (row < T)[:, None] & inside[None, :]
        at = row[:, None] * D + cols[None, :]
        up = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
        act, slope = silu_and_slope(tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32))
        if dgate_ptr is not None:
            grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32)
            dgate, dup = grad * up * slope, grad * act
            dbias1 += tl.sum(dgate, 0)
            dbias3 += tl.sum(dup, 0)
            tl.store(dgate_ptr + at, dgate, mask=live)
            tl.store(dup_ptr + at, dup, mask=live)
        tl.store(grad_ptr + at, act * up, mask=live)
    if partial_ptr is not None:
        tl.store(partial_ptr + 2 * chunk * D + cols, dbias1, mask=inside)
        tl.store(partial_ptr + (2 * chunk + 1) * D + cols, dbias3, mask=inside)


def swiglu_pass(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    dbias1: torch.Tensor | None,
    dbias3: torch.Tensor | None,
) -> None:
    """Launch it, as the op does."""
    M, width = grad.shape
    chunks, programs, meta = block_tiling(pick("swiglu_backward", CONFIG, grad, gate), 1, M, width)
    biases = (dbias1, dbias3)
    partial = None if biases == (None, None) else empty_partials(1, chunks, 2, width, grad.device)
    launch(_swiglu_backward_kernel, programs, grad, gate, up, dgate, dup, partial, M, **meta)
    if partial is not None:
        unwanted = partial.new_empty((1, width))
        sum_partials(partial, *(unwanted if dbias is None else dbias.view(1, width) for dbias in biases))


_OP = Op(
    "swiglu_backward",
    swiglu_backward_ref,
    kernels=InPlace(
        "Tensor(a!) grad, Tensor gate, Tensor up, "
        "Tensor(b!)? dgate, Tensor(c!)? dup, Tensor(d!)? dbias1, Tensor(e!)? dbias3",
        swiglu_pass,
    ),
)


def swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    dbias1: torch.Tensor | None,
    dbias3: torch.Tensor | None,
    *,
    backend: str = "auto",
) -> None:
    """In place: grad becomes silu(gate) * up; writes dgate, dup, all (M, F), and the sums of their columns, (F).

    None for what is not wanted: a dbias, or all four, and then grad is not read. ValueError for another choice, shapes
    that disagree, dtypes that are not floating, or tensors that are not contiguous.
    """
    tensors = dict(zip(DIMS, (grad, gate, up, dgate, dup, dbias1, dbias3), strict=True))
    check_dims(_OP.name, DIMS, tensors, _OP.optional)
    missing = [dgate is None, dup is None]
    if any(missing) and not (all(missing) and dbias1 is None and dbias3 is None):
        raise ValueError(f"{_OP.name}: dgate or dup is None, expected both or, with dbias1 and dbias3, neither")
    check_floating(_OP.name, tensors)
    check_contiguous(_OP.name, tensors)
    _OP(backend, tuple(tensors.values()))


SPEC = OpSpec(
    op=_OP,
    fn=swiglu_backward,
    dims=DIMS,
    cases=(
        Case("odd", {"M": 63, "F": 72}),
        Case("wide", {"M": 130, "F": 200}),
        Case("mixed", {"M": 33, "F": 96}, mixed=True),
        Case("empty", {"M": 0, "F": 40}),
        Case("act_alone", {"M": 63, "F": 72}, absent=("dgate", "dup", "dbias1", "dbias3")),
        Case("no_biases", {"M": 63, "F": 72}, absent=("dbias1", "dbias3")),
        Case("one_bias", {"M": 63, "F": 72}, absent=("dbias1",)),
    ),
    bench=(Case("LightningDiT-XL", {"M": 65536, "F": 3072}), Case("LargeDiT-3B", {"M": 65536, "F": 8192})),
    stream=("dbias1", "dbias3"),
    optional=("dgate", "dup", "dbias1", "dbias3"),
    mutates=("grad",),
    overwrites=("dgate", "dup", "dbias1", "dbias3"),
    traffic=(Case("LightningDiT-XL, 128 tokens", {"M": 128, "F": 3072}),),
)
