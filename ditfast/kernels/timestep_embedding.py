"""e = [cos(t f) | sin(t f)] with f_i = max_period^(-i / half), half = dim // 2: the sinusoidal embedding of a timestep.

t   (B,), integer or floating, stride free; integers up to 2^24 are exact
e   (B, dim), contiguous; an odd dim ends in a column of zeros
dt  sum over i of f_i (cos(t f_i) de_{half + i} - sin(t f_i) de_i), where t is floating
cos comes first and the exponent divides by half, as in the official DiT (other code bases differ in both).

The reference computes in fp32 (float64 where t is), where an angle of 1000 rad is rounded by 3e-5. The kernels compute
in float64, so that their values round once; the library's sine needs a stack for the angles that it cannot rule out.
"""

import math
from typing import Any

import torch

from ._checks import check_dims, check_number, check_out_dtype, check_whole
from ._op import Kernels, Op
from ._triton import jit, launch, tl
from .autotune import pick
from .peers import diffusers_timestep_embedding
from .spec import Case, OpSpec

DIMS = {"t": "B"}
# (angles of a program, warps): 4 angles for a thread, whose float64 registers then suffice without spills, and 64
# programs for 256 timesteps. Not measured on a chip yet; the launch is what costs.
CONFIG = (512, 4)


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


@jit
def _cos_sin(t_ptr, row, live, stride_t, col, DECAY: tl.constexpr):
    """(f, cos(t f), sin(t f)) in float64, by Taylor series after reduction to an eighth of a turn either side."""
    t = tl.load(t_ptr + row * stride_t, mask=live, other=0).to(tl.float64)
    freq = tl.exp(col.to(tl.float64) * DECAY)
    quarters = t[:, None] * freq[None, :] * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    r = (quarters - whole) * 1.5707963267948966
    s = r * r
    # Coefficients 1 / n!; the first left out is below 1e-11, nothing beside fp32's rounding.
    cos = 1 + s * (-0.5 + s * (4.1666666666666664e-2 + s * (-1.388888888888889e-3 + s * 2.48015873015873e-5)))
    cos += s * s * s * s * s * (-2.755731922398589e-7 + s * 2.08767569878681e-9)
    sin = 1 + s * (-0.16666666666666666 + s * (8.333333333333333e-3 + s * (-1.984126984126984e-4)))
    sin = r * (sin + s * s * s * s * (2.7557319223985893e-6 + s * (-2.505210838544172e-8)))
    quadrant = whole.to(tl.int64) & 3
    swapped = (quadrant & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return freq, cos, tl.where(quadrant >= 2, -sin, sin)


@jit
def _timestep_embedding_fwd_kernel(
    t_ptr,
    e_ptr,
    B,
    stride_t,
    DECAY: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.arange(0, COLS)
    live = row < B
    _, cos, sin = _cos_sin(t_ptr, row, live, stride_t, col, DECAY)
    inside = live[:, None] & (col < HALF)[None, :]
    e = e_ptr + row[:, None] * DIM + col[None, :]
    tl.store(e, cos.to(tl.float32), mask=inside)
    tl.store(e + HALF, sin.to(tl.float32), mask=inside)
    if DIM > 2 * HALF:
        tl.store(e_ptr + row * DIM + 2 * HALF, tl.zeros([BLOCK_B], tl.float32), mask=live)


@jit
def _timestep_embedding_bwd_kernel(
    de_ptr,
    t_ptr,
    dt_ptr,
    B,
    stride_deb,
    stride_ded,
    stride_t,
    DECAY: tl.constexpr,
    HALF: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.arange(0, COLS)
    live = row < B
    freq, cos, sin = _cos_sin(t_ptr, row, live, stride_t, col, DECAY)
    inside = live[:, None] & (col < HALF)[None, :]
    de = de_ptr + row[:, None] * stride_deb + col[None, :] * stride_ded
    dcos = tl.load(de, mask=inside, other=0.0).to(tl.float64)
    dsin = tl.load(de + HALF * stride_ded, mask=inside, other=0.0).to(tl.float64)
    dt = tl.sum((dsin * cos - dcos * sin) * freq[None, :], 1)
    tl.store(dt_ptr + row, dt.to(tl.float32), mask=live)


def _tiling(kernel: str, t: torch.Tensor, dim: int, max_period: float) -> tuple[int, dict[str, Any]]:
    """(programs, constants of a launch); the decay is one of them since a float argument would come in fp32."""
    half = dim // 2
    cols = 1 << (half - 1).bit_length()
    angles, warps = pick(kernel, CONFIG, t, dim)
    block = max(1, angles // cols)
    decay = -math.log(max_period) / half
    meta = {"DECAY": decay, "HALF": half, "COLS": cols, "BLOCK_B": block, "num_warps": warps}
    return -(-t.shape[0] // block), meta


def _timestep_embedding_empty(
    t: torch.Tensor, dim: int, max_period: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor]:
    """e, not yet written."""
    return (torch.empty((t.shape[0], dim), dtype=out_dtype, device=t.device),)


def _timestep_embedding_fwd(
    results: tuple[torch.Tensor, ...], t: torch.Tensor, dim: int, max_period: float, out_dtype: torch.dtype
) -> None:
    (e,) = results
    programs, meta = _tiling("timestep_embedding_fwd", t, dim, max_period)
    args = (t, e, t.shape[0], t.stride(0))
    launch(_timestep_embedding_fwd_kernel, programs, *args, DIM=dim, **meta)


def _timestep_embedding_bwd(
    grads: tuple[torch.Tensor, ...],
    de: torch.Tensor,
    t: torch.Tensor,
    dim: int,
    max_period: float,
    out_dtype: torch.dtype,
) -> None:
    (dt,) = grads
    programs, meta = _tiling("timestep_embedding_bwd", t, dim, max_period)
    args = (de, t, dt, t.shape[0], *de.stride(), t.stride(0))
    launch(_timestep_embedding_bwd_kernel, programs, *args, **meta)


_OP = Op(
    "timestep_embedding",
    timestep_embedding_ref,
    kernels=Kernels(
        inputs="Tensor t",
        attrs="int dim, float max_period, ScalarType out_dtype",
        outputs=("e",),
        saved=(),
        empty=_timestep_embedding_empty,
        fwd=_timestep_embedding_fwd,
        bwd=_timestep_embedding_bwd,
    ),
)


def timestep_embedding(
    t: torch.Tensor,
    dim: int = 256,
    max_period: float = 10000,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """[cos | sin] embedding (B, dim) of t (B,) in out_dtype (float32 by default).

    ValueError where t has another rank or is not of numbers, dim is below 2, max_period not positive or
    out_dtype not a floating-point one.
    """
    check_dims(_OP.name, DIMS, {"t": t})
    if t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"{_OP.name}: t has dtype {t.dtype}, expected an integer or floating-point one")
    check_whole(_OP.name, "dim", dim, 2)
    check_number(_OP.name, "max_period", max_period)
    if max_period <= 0:
        raise ValueError(f"{_OP.name}: max_period is {max_period}, expected a positive number")
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    check_out_dtype(_OP.name, out_dtype)
    return _OP(backend, (t,), (dim, max_period, out_dtype))


SPEC = OpSpec(
    op=_OP,
    fn=timestep_embedding,
    dims=DIMS,
    cases=(
        Case("floats", {"B": 37}, floats=True),
        Case("integers", {"B": 5}),
        Case("odd", {"B": 3}, {"dim": 33, "max_period": 100.0}),
        Case("strided", {"B": 4}, {"dim": 8}, strided=True),
        Case("floats_strided", {"B": 3}, {"dim": 7}, floats=True, strided=True),
        Case("wide", {"B": 3}, {"dim": 1030}, floats=True),
        Case("empty", {"B": 0}),
    ),
    bench=(Case("DiT-XL/2", {"B": 256}), Case("continuous time", {"B": 256}, floats=True)),
    traffic=(Case("DiT-XL/2", {"B": 256}), Case("continuous time", {"B": 256}, floats=True)),
    integers={"t": 1000},
    shard=("B",),
    peers={"diffusers": diffusers_timestep_embedding},
)
