"""x_new = x + gate * branch: the gated residual of adaLN-Zero (DiT, arXiv:2212.09748, section 3.2).

x       (B, T, D), the residual stream; x_new has its dtype
branch  (B, T, D), any floating dtype, strides free
gate    (B, D), row stride free, or None for a plain residual
"""

import torch

from ._checks import check_dims, check_floating
from ._op import Op
from .spec import XL_CASES, OpSpec, token_cases

DIMS = {"x": "B T D", "branch": "B T D", "gate": "B D"}


def gate_residual_ref(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The equation in plain PyTorch: gate * branch rounds in the branch's dtype, as under the official autocast."""
    return (x + (branch if gate is None else gate.unsqueeze(1) * branch)).to(x.dtype)


_OP = Op("gate_residual", gate_residual_ref)


def gate_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, *, backend: str = "auto"
) -> torch.Tensor:
    """x + gate * branch (B, T, D) in x's dtype, for x and branch (B, T, D) and gate (B, D) or None (a gate of one).

    ValueError for shapes that disagree or dtypes that are not floating.
    """
    tensors = {"x": x, "branch": branch, "gate": gate}
    check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x, branch, gate))


SPEC = OpSpec(
    op=_OP,
    fn=gate_residual,
    dims=DIMS,
    cases=token_cases(),
    bench=XL_CASES,
    stream=("x",),
    optional=("gate",),
    shard=("B", "T"),
    recompute=("x_new",),
)
