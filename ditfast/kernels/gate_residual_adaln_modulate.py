"""x_new = x + gate * branch; y = LayerNorm(x_new) * (1 + scale) + shift: the boundary between two blocks as one op.

x, branch           (B, T, D); x_new has x's dtype, y has out_dtype
gate, shift, scale  (B, D), row stride free; gate may be None
"""

import torch

from ._checks import check_dims, check_floating
from ._op import Op
from .adaln_modulate import adaln_modulate_ref
from .gate_residual import gate_residual_ref
from .spec import XL_CASES, OpSpec, token_cases

DIMS = {"x": "B T D", "branch": "B T D", "gate": "B D", "shift": "B D", "scale": "B D"}


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


_OP = Op("gate_residual_adaln_modulate", gate_residual_adaln_modulate_ref)


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
    that are not floating.
    """
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x, branch, gate, shift, scale), (eps, out_dtype or x.dtype))


SPEC = OpSpec(
    op=_OP,
    fn=gate_residual_adaln_modulate,
    dims=DIMS,
    cases=token_cases(),
    bench=XL_CASES,
    stream=("x",),
    optional=("gate",),
    shard=("B", "T"),
    recompute=("x_new", "y"),
)
