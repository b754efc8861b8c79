"""x_new = x + gate * branch; y = LayerNorm(x_new) * (1 + scale) + shift: the boundary between two blocks as one op.

The norm, LayerNorm or RMSNorm, with a weight or not, is that of adaln_modulate.py, of x_new as rounded to x's dtype, so
that a recomputed norm is the same; the gradients are in _norm.py, beside the kernels.

x, branch           (B, T, D), batch and row strides free, the last dim dense (else copied); dx_new, dy likewise
gate, shift, scale  (B, D), row strides free: views from chunk(6) are read in place; gate None is a plain residual
weight              (D); it, shift and scale may each be None
x_new, y            (B, T, D), contiguous; x_new in x's dtype, y in out_dtype
dtypes              float32, bfloat16, float16, each tensor its own; D up to 8192
fp32                all arithmetic, mean and rstd, the partial sums: one rounding per stored value
saved               x_new, branch (but for its gate), gate, shift, scale, weight (nothing is copied); mean (LayerNorm
                    only) and rstd (B, T) in fp32

The forward reads x and branch once, the backward dx_new, dy, x_new and branch.
"""

from typing import Any

import torch

from ._checks import check_dims, check_floating, check_number, check_out_dtype
from ._norm import NORM_BENCH, check_norm, norm_bwd, norm_cases, norm_empty, norm_fwd
from ._op import Kernels, Op
from .adaln_modulate import adaln_modulate_ref
from .gate_residual import gate_residual_ref
from .peers import after_residual, apex_modulated_norm, liger_modulated_norm
from .spec import Case, OpSpec

DIMS = {"x": "B T D", "branch": "B T D", "gate": "B D", "shift": "B D", "scale": "B D", "weight": "D"}

# (largest D, rows of a tile, rows of a program, warps). Not measured on a chip yet; chosen as in adaln_modulate.py, but
# tiles of half the rows, since there are more tensors to hold: at D 1152 four blocks of a forward share an SM, where
# tiles of 4 rows would leave two, and a backward of 2 rows spills (sm_90, triton 3.6). 64 rows of a backward share
# three partial rows: 12 bytes per 64 x 12 in bf16, written and read, 3 % more.
# From D 3072 on 16 warps: with 8, RMSNorm of a float32 stream spills at D 3072 (sm_90, triton 3.9).
# At D 8192 under a float32 stream the backward spills about 100 bytes a thread on sm_80 and sm_90, with 32 warps too.
FWD_CONFIGS = ((64, 16, 32, 4), (256, 8, 16, 4), (512, 2, 8, 4), (1536, 2, 8, 4), (4096, 1, 8, 8), (8192, 1, 8, 16))
BWD_CONFIGS = ((64, 16, 64, 4), (256, 8, 64, 4), (512, 4, 64, 4), (1536, 1, 64, 4), (8192, 1, 64, 16))


def gate_residual_adaln_modulate_ref(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two references, one after the other."""
    x_new = gate_residual_ref(x, branch, gate)
    return x_new, adaln_modulate_ref(x_new, shift, scale, weight, eps, norm, out_dtype)


def _gate_residual_adaln_modulate_empty(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """x_new, y, mean, rstd, not yet written."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *norm_empty(x, norm, out_dtype)


def _gate_residual_adaln_modulate_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> None:
    norm_fwd(_OP.name, FWD_CONFIGS, results, x, branch, gate, shift, scale, weight, eps, norm)


def _gate_residual_adaln_modulate_bwd(
    grads: tuple[torch.Tensor, ...],
    dx_new: torch.Tensor,
    dy: torch.Tensor,
    x_new: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> None:
    norm_bwd(_OP.name, BWD_CONFIGS, grads, dx_new, dy, x_new, branch, gate, shift, scale, weight, mean, rstd, norm)


_OP = Op(
    "gate_residual_adaln_modulate",
    gate_residual_adaln_modulate_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight",
        attrs="float eps, str norm, ScalarType out_dtype",
        outputs=("x_new", "y"),
        saved=("mean", "rstd"),
        empty=_gate_residual_adaln_modulate_empty,
        fwd=_gate_residual_adaln_modulate_fwd,
        bwd=_gate_residual_adaln_modulate_bwd,
        stand_ins={"x": "x_new"},
        unread_without={"branch": "gate"},
    ),
)


def _norm_again_empty(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor]:
    """y, not yet written."""
    return (torch.empty(x.shape, dtype=args[-1], device=x.device),)


def _norm_again_fwd(
    results: tuple[torch.Tensor],
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    branch: torch.dtype,
    gate: torch.dtype | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> None:
    mean, rstd = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
    norm_fwd(
        _OP.name, FWD_CONFIGS, (*results, mean, rstd), x, None, None, shift, scale, weight, eps, norm, (branch, gate)
    )


_AGAIN = Op(
    "norm_again",
    lambda x, shift, scale, weight, branch, gate, *options: adaln_modulate_ref(x, shift, scale, weight, *options),
    kernels=Kernels(
        inputs="Tensor x, Tensor? shift, Tensor? scale, Tensor? weight",
        attrs="ScalarType branch, ScalarType? gate, float eps, str norm, ScalarType out_dtype",
        outputs=("y",),
        saved=(),
        empty=_norm_again_empty,
        fwd=_norm_again_fwd,
        bwd=None,
    ),
)


def norm_again(
    x_new: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    branch: torch.dtype,
    gate: torch.dtype | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> torch.Tensor:
    """y of `gate_residual_adaln_modulate`, to the bit, from its x_new and the dtypes of its branch and gate.

    It has the tiles of that op, pinned or measured, which decide the order of a row's sums; adaln_modulate's are other
    ones. No derivative: a recompute policy takes the op's.
    """
    return _AGAIN(backend, (x_new, shift, scale, weight), (branch, gate, eps, norm, out_dtype))


def gate_residual_adaln_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_new, y): x_new = x + gate * branch in x's dtype, y = norm(x_new) * weight * (1 + scale) + shift in out_dtype.

    x and branch are (B, T, D), gate, shift and scale (B, D), weight is (D); each of these four may be None. norm is
    "layer" or "rms", out_dtype x's by default. ValueError for another norm, shapes that disagree or dtypes that are
    not floating; BackendError where the backend cannot run.
    """
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale, "weight": weight}
    check_dims(_OP.name, DIMS, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    check_norm(_OP.name, norm)
    check_number(_OP.name, "eps", eps)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_out_dtype(_OP.name, out_dtype)
    return _OP(backend, tuple(tensors.values()), (eps, norm, out_dtype))


SPEC = OpSpec(
    op=_OP,
    fn=gate_residual_adaln_modulate,
    dims=DIMS,
    cases=(*norm_cases(), Case("no_gate", {"B": 5, "T": 63, "D": 48}, absent=("gate", "weight"))),
    bench=NORM_BENCH,
    stream=("x",),
    optional=("gate", "shift", "scale", "weight"),
    shard=("B", "T"),
    recompute=("x_new", "y"),
    bwd_unread=("shift",),
    peers={"liger-kernel": after_residual(liger_modulated_norm), "apex": after_residual(apex_modulated_norm)},
)
