"""grad <- grad * gelu'(pre), act = gelu(pre), dbias = column sums of grad: a GELU's backward between a library's GEMMs.

The tanh form of GELU (arXiv:1606.08415).

grad   (M, F), the gradient of act; in place, that of pre; None where act alone is wanted
pre    (M, F)
act    (M, F), written: the gradient of the following weight needs it, and it was not kept; or None
dbias  (F), written; or None, as with grad
dtypes float32, bfloat16, float16, each tensor its own; any F. All contiguous
fp32   all arithmetic and the partial sums of dbias: one rounding per stored value

One pass: 4 M F elements move, where PyTorch's GELU, its gradient and the sum of the bias move 6.
"""

import torch
import torch.nn.functional as F

from ._activations import gelu_and_slope
from ._checks import check_contiguous, check_dims, check_floating
from ._op import InPlace, Op
from ._rows import block_tiling, empty_partials, sum_partials
from ._triton import jit, launch, tl
from .autotune import pick
from .spec import Case, OpSpec

DIMS = {"grad": "M F", "pre": "M F", "act": "M F", "dbias": "F"}

# (rows of a tile, columns of a tile, rows of a program, warps): as gate_residual's, for the same reasons.
CONFIG = (16, 128, 64, 4)


def gelu_backward_ref(
    grad: torch.Tensor | None, pre: torch.Tensor, act: torch.Tensor | None, dbias: torch.Tensor | None
) -> None:
    """The equation in plain PyTorch."""
    if act is not None:
        act.copy_(F.gelu(pre, approximate="tanh"))
    if grad is not None:
        grad.copy_(torch.ops.aten.gelu_backward(grad, pre.to(grad.dtype), approximate="tanh"))
        if dbias is not None:
            dbias.copy_(grad.sum(0))


@jit
def _gelu_backward_kernel(
    pre_ptr,
    grad_ptr,
    act_ptr,
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
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for t in range(0, ROWS, BLOCK_T):
        row = chunk * ROWS + t + tl.arange(0, BLOCK_T)
        live = (row < T)[:, None] & inside[None, :]
        at = row[:, None] * D + cols[None, :]
        pre = tl.load(pre_ptr + at, mask=live, other=0.0).to(tl.float32)
        act, slope = gelu_and_slope(pre)
        if act_ptr is not None:
            tl.store(act_ptr + at, act, mask=live)
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32) * slope
            dbias += tl.sum(grad, 0)
            tl.store(grad_ptr + at, grad, mask=live)
    if partial_ptr is not None:
        tl.store(partial_ptr + chunk * D + cols, dbias, mask=inside)


def gelu_pass(
    grad: torch.Tensor | None, pre: torch.Tensor, act: torch.Tensor | None, dbias: torch.Tensor | None
) -> None:
    """Launch it, as the op does."""
    M, width = pre.shape
    chunks, programs, meta = block_tiling(pick("gelu_backward", CONFIG, grad, pre), 1, M, width)
    partial = None if dbias is None else empty_partials(1, chunks, 1, width, pre.device)
    launch(_gelu_backward_kernel, programs, pre, grad, act, partial, M, **meta)
    if dbias is not None and partial is not None:
        sum_partials(partial, dbias.view(1, width))


_OP = Op(
    "gelu_backward",
    gelu_backward_ref,
    kernels=InPlace("Tensor(a!)? grad, Tensor pre, Tensor(b!)? act, Tensor(c!)? dbias", gelu_pass),
)


def gelu_backward(
    grad: torch.Tensor | None,
    pre: torch.Tensor,
    act: torch.Tensor | None,
    dbias: torch.Tensor | None,
    *,
    backend: str = "auto",
) -> None:
    """In place: grad * gelu'(pre), both (M, F); writes act (M, F) = gelu(pre) and dbias (F), sums of grad's columns.

    None for what is not wanted. ValueError for a dbias without grad, shapes that disagree, dtypes that are not
    floating, or tensors that are not contiguous.
    """
    tensors = {"grad": grad, "pre": pre, "act": act, "dbias": dbias}
    check_dims(_OP.name, DIMS, tensors, _OP.optional)
    if grad is None and dbias is not None:
        raise ValueError(f"{_OP.name}: dbias is given and grad is None, expected both: it is the sum of grad's columns")
    check_floating(_OP.name, tensors)
    check_contiguous(_OP.name, tensors)
    _OP(backend, (grad, pre, act, dbias))


SPEC = OpSpec(
    op=_OP,
    fn=gelu_backward,
    dims=DIMS,
    cases=(
        Case("odd", {"M": 63, "F": 72}),
        Case("wide", {"M": 130, "F": 200}),
        Case("mixed", {"M": 33, "F": 96}, mixed=True),
        Case("empty", {"M": 0, "F": 40}),
        Case("act_alone", {"M": 63, "F": 72}, absent=("grad", "dbias")),
        Case("grad_alone", {"M": 63, "F": 72}, absent=("act", "dbias")),
        Case("no_act", {"M": 63, "F": 72}, absent=("act",)),
    ),
    bench=(Case("DiT-XL/2", {"M": 65536, "F": 4608}), Case("LargeDiT-3B", {"M": 65536, "F": 8192})),
    stream=("dbias",),
    optional=("grad", "act", "dbias"),
    mutates=("grad",),
    overwrites=("act", "dbias"),
    traffic=(Case("DiT-XL/2, 128 tokens", {"M": 128, "F": 4608}),),
)
