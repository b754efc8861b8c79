"""y = LayerNorm(x) * (1 + scale) + shift (DiT, arXiv:2212.09748, section 3.2), or RMSNorm, each with a weight or not.

norm="layer": n = (x - mean) * rstd, rstd = 1 / sqrt(var + eps), var biased
norm="rms":   n = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) (arXiv:1910.07467)
y = n * weight * (1 + scale) + shift; the gradients are in _norm.py, beside the kernels.

x            (B, T, D), batch and row strides free, the last dim dense (else it is copied); dy likewise
shift, scale (B, D), row stride free: views from chunk(6) are read in place; the last dim dense (else copied)
weight       (D); it, shift and scale may each be None
y            (B, T, D), contiguous, in out_dtype
dtypes       float32, bfloat16, float16, each tensor its own; D up to 8192
fp32         all arithmetic, mean and rstd, the partial sums of the vectors' gradients: one rounding per stored value
saved        x, shift, scale, weight (nothing is copied), mean (LayerNorm only) and rstd (B, T) in fp32

The forward reads x once, the backward x and dy.
"""

import torch

from ._checks import check_dims, check_floating, check_number, check_out_dtype
from ._norm import NORM_BENCH, check_norm, norm_bwd, norm_cases, norm_empty, norm_fwd, norm_ref
from ._op import Kernels, Op
from .peers import apex_modulated_norm, liger_modulated_norm
from .spec import OpSpec

DIMS = {"x": "B T D", "shift": "B D", "scale": "B D", "weight": "D"}

# (largest D, rows of a tile, rows of a program, warps). Not measured on a chip yet; chosen so that
# - a thread holds about 32 elements of a forward tile, half that of a backward tile, which keeps dy, n, g and two sums:
#   16-byte loads in flight, no spills on sm_80, sm_90 and sm_100 (at D 1152, backward tiles of 4 rows spill on sm_100);
# - forward, 8 rows or more share one read of shift and scale: at most 1/8 more bytes than the minimum asked of the L2;
# - backward, 64 rows or more share one partial row of dshift and dscale: 8 bytes per 64 x 6 in bf16, 2 % more.
FWD_CONFIGS = ((64, 32, 32, 4), (256, 8, 16, 4), (512, 8, 8, 4), (1536, 4, 8, 4), (4096, 2, 8, 8), (8192, 1, 8, 8))
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
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The equation in plain PyTorch, in the dtypes that come: 1 + scale rounds in scale's, as under autocast."""
    y = norm_ref(x, eps, norm)
    if weight is not None:
        y = y * weight
    if scale is not None:
        y = y * (1 + scale.unsqueeze(1))
    if shift is not None:
        y = y + shift.unsqueeze(1)
    return y.to(out_dtype or x.dtype)


def _adaln_modulate_empty(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """y, mean, rstd, not yet written."""
    return norm_empty(x, norm, out_dtype)


def _adaln_modulate_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> None:
    norm_fwd(_OP.name, FWD_CONFIGS, results, x, None, None, shift, scale, weight, eps, norm)


def _adaln_modulate_bwd(
    grads: tuple[torch.Tensor, ...],
    dy: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    norm: str,
    out_dtype: torch.dtype,
) -> None:
    norm_bwd(_OP.name, BWD_CONFIGS, grads, None, dy, x, None, None, shift, scale, weight, mean, rstd, norm)


_OP = Op(
    "adaln_modulate",
    adaln_modulate_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor? shift, Tensor? scale, Tensor? weight",
        attrs="float eps, str norm, ScalarType out_dtype",
        outputs=("y",),
        saved=("mean", "rstd"),
        empty=_adaln_modulate_empty,
        fwd=_adaln_modulate_fwd,
        bwd=_adaln_modulate_bwd,
    ),
)


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """y (B, T, D) = norm(x) * weight * (1 + scale) + shift in out_dtype (x's by default), of x (B, T, D).

    shift and scale are (B, D), weight is (D); each may be None. norm is "layer" or "rms". ValueError for another one,
    shapes that disagree or dtypes that are not floating; BackendError where the backend cannot run.
    """
    tensors = {"x": x, "shift": shift, "scale": scale, "weight": weight}
    check_dims(_OP.name, DIMS, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    check_norm(_OP.name, norm)
    check_number(_OP.name, "eps", eps)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_out_dtype(_OP.name, out_dtype)
    return _OP(backend, tuple(tensors.values()), (eps, norm, out_dtype))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467): `adaln_modulate` without modulation."""
    return adaln_modulate(x, None, None, eps, norm="rms", weight=weight, out_dtype=out_dtype, backend=backend)


SPEC = OpSpec(
    op=_OP,
    fn=adaln_modulate,
    dims=DIMS,
    cases=norm_cases(),
    bench=NORM_BENCH,
    stream=("x",),
    optional=("shift", "scale", "weight"),
    shard=("B", "T"),
    recompute=("y",),
    bwd_unread=("shift",),
    peers={"liger-kernel": liger_modulated_norm, "apex": apex_modulated_norm},
)
