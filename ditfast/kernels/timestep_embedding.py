"""e = [cos(t f) | sin(t f)] with f_i = max_period^(-i / half), half = dim // 2: the sinusoidal embedding of a timestep.

t  (B,), integer or floating; integers up to 2^24 are exact
e  (B, dim), computed in fp32 (float64 where t is); an odd dim ends in a column of zeros
cos comes first and the exponent divides by half, as in the official DiT (other code bases differ in both).
"""

import math

import torch

from ._checks import check_dims
from ._op import Op
from .spec import Case, OpSpec

DIMS = {"t": "B"}


def timestep_embedding_ref(t: torch.Tensor, dim: int, max_period: float, out_dtype: torch.dtype) -> torch.Tensor:
    """The equation in plain PyTorch."""
    compute = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=compute, device=t.device) / half)
    angles = t.to(compute).unsqueeze(1) * freqs
    parts = [angles.cos(), angles.sin()]
    if dim % 2:
        parts.append(torch.zeros_like(angles[:, :1]))
    return torch.cat(parts, dim=1).to(out_dtype)


_OP = Op("timestep_embedding", timestep_embedding_ref)


def timestep_embedding(
    t: torch.Tensor,
    dim: int = 256,
    max_period: float = 10000,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """[cos | sin] embedding (B, dim) of t (B,) in out_dtype (float32 by default).

    ValueError where t has another rank or is not of numbers, dim is below 2 or max_period not positive.
    """
    check_dims(_OP.name, DIMS, {"t": t})
    if t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"{_OP.name}: t has dtype {t.dtype}, expected an integer or floating-point one")
    if dim < 2 or max_period <= 0:
        raise ValueError(f"{_OP.name}: dim is {dim} and max_period {max_period}, expected dim >= 2 and max_period > 0")
    return _OP(backend, (t,), (dim, max_period, out_dtype or torch.float32))


SPEC = OpSpec(
    op=_OP,
    fn=timestep_embedding,
    dims=DIMS,
    cases=(
        Case("default", {"B": 5}),
        Case("odd", {"B": 3}, {"dim": 33, "max_period": 100.0}),
        Case("strided", {"B": 4}, {"dim": 8}, strided=True),
        Case("empty", {"B": 0}),
    ),
    bench=(Case("DiT-XL/2", {"B": 256}),),
    integers={"t": 1000},
    shard=("B",),
)
