"""y = gelu(h w1^T + b1) w2^T + b2 with the tanh approximation of GELU (arXiv:1606.08415): the MLP of a block.

h       (..., D), any leading dims
w1, b1  (F, D), (F)
w2, b2  (D, F), (D)
Under autocast the linears run in autocast's dtype, as PyTorch's own do.
"""

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating
from ._op import Op
from .spec import Case, OpSpec

DIMS = {"h": "... D", "w1": "F D", "b1": "F", "w2": "D F", "b2": "D"}


def gelu_mlp_ref(
    h: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """The equation in plain PyTorch."""
    return F.linear(F.gelu(F.linear(h, w1, b1), approximate="tanh"), w2, b2)


_OP = Op("gelu_mlp", gelu_mlp_ref)


def gelu_mlp(
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """y (..., D) of h (..., D), w1 (F, D), b1 (F), w2 (D, F), b2 (D); ValueError for other shapes or integer dtypes."""
    tensors = {"h": h, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (h, w1, b1, w2, b2))


SPEC = OpSpec(
    op=_OP,
    fn=gelu_mlp,
    dims=DIMS | {"h": "B T D"},
    cases=(
        Case("odd", {"B": 3, "T": 7, "D": 24, "F": 40}),
        Case("strided", {"B": 2, "T": 5, "D": 16, "F": 64}, strided=True),
        Case("empty", {"B": 0, "T": 5, "D": 16, "F": 64}),
    ),
    bench=(Case("DiT-XL/2", {"B": 256, "T": 256, "D": 1152, "F": 4608}),),
    flops=lambda inputs: 4 * inputs["h"].numel() * inputs["w1"].shape[0],
    shard=("B", "T"),
)
