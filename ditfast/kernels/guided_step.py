"""One step of a sampler: guidance, the predicted x_0, and x_next by DDPM, DDIM or Euler, as its coefficients say.

pred = uncond + scale (cond - uncond) on the guided channels, cond on the others (Ho & Salimans 2022, equation 6)
x_0 = x0_x x + x0_pred pred, clamped to [-1, 1] on request
x_next = next_x x + next_x0 x_0 + next_pred pred + std exp(std_v v) noise

x             (B, C, ...), batch and channel strides free, the other dims dense together (else it is copied)
cond          (B, C, ...), or (B, 2C, ...) where the variance is learned: pred, then v; strides as of x
uncond        (B, G, ...) with 1 <= G <= C, the first G channels are guided; None without guidance; strides as of x
noise         (B, C, ...), strides as of x; None without noise
coefficients  (B, 6), or (B, 7) where the variance is learned: x0_x, x0_pred, next_x, next_x0, next_pred, std, std_v of
              each sample, so that samples may be at different timesteps and the host reads none; strides free
x_next, x_0   (B, C, ...), contiguous, in the wider dtype of x and coefficients
fp32          all arithmetic: one rounding per stored value
saved         nothing, the kernel has no derivative: under autograd "auto" takes the reference

DDPM takes next_x and next_x0 from the posterior's mean (Ho et al. 2020, equation 7), DDIM (Song et al. 2020, equation
12) too has next_pred = 0: its direction, the noise between x and the clamped x_0, is a combination of them. A learned
range (Nichol & Dhariwal 2021, equation 15) has half the mean of its two log variances as log std, and a quarter of
their difference as std_v. std is 0 at t = 0. The Euler step of a velocity has next_x = 1 and next_pred = dt.
"""

from typing import Any

import torch

from ._checks import check_dims, check_flag, check_floating, check_number
from ._op import Kernels, Op
from ._triton import jit, launch, rows, tl
from .autotune import pick
from .spec import Case, OpSpec

DIMS = {"x": "B C H W", "cond": "B K H W", "uncond": "B G H W", "noise": "B C H W", "coefficients": "B N"}
# Positions of a program, all of one channel, and warps. Not measured on a chip yet: a thread reads 16 bytes of each
# fp32 tensor, and (32, 4, 32, 32) makes 256 programs.
CONFIG = (512, 4)


def guide(cond: torch.Tensor, uncond: torch.Tensor | None, scale: float) -> torch.Tensor:
    """cond (B, K, ...) with its first G channels guided away from uncond (B, G, ...); cond itself without one."""
    if uncond is None:
        return cond
    guided = uncond.shape[1]
    return torch.cat([uncond + scale * (cond[:, :guided] - uncond), cond[:, guided:]], dim=1)


def guided_step_ref(
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    coefficients: torch.Tensor,
    scale: float,
    clip: bool,
    keep_x0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations in plain PyTorch; x_0 is returned in any case."""
    columns = coefficients.view(*coefficients.shape, *(1,) * (x.ndim - 1)).unbind(1)
    x0_x, x0_pred, next_x, next_x0, next_pred, std, *std_v = columns
    C = x.shape[1]
    pred = guide(cond[:, :C], uncond, scale)
    x0 = x0_x * x + x0_pred * pred
    if clip:
        x0 = x0.clamp(-1, 1)
    x_next = next_x0 * x0 + next_x * x + next_pred * pred
    if noise is not None:
        if std_v:
            std = std * torch.exp(std_v[0] * cond[:, C:])
        x_next = x_next + std * noise
    return x_next, x0


@jit
def _guided_step_fwd_kernel(
    x_ptr,
    cond_ptr,
    uncond_ptr,
    noise_ptr,
    coefficients_ptr,
    x_next_ptr,
    x0_ptr,
    scale,
    C,
    guided,
    positions,
    blocks,
    stride_xb,
    stride_xc,
    stride_cond_b,
    stride_cond_c,
    stride_uncond_b,
    stride_uncond_c,
    stride_noise_b,
    stride_noise_c,
    stride_b,
    stride_n,
    LEARNED: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = at < positions
    sample, channel = (row // C).to(tl.int64), (row % C).to(tl.int64)

    coefficient = coefficients_ptr + sample * stride_b
    x0_x = tl.load(coefficient).to(tl.float32)
    x0_pred = tl.load(coefficient + stride_n).to(tl.float32)
    next_x = tl.load(coefficient + 2 * stride_n).to(tl.float32)
    next_x0 = tl.load(coefficient + 3 * stride_n).to(tl.float32)
    next_pred = tl.load(coefficient + 4 * stride_n).to(tl.float32)

    x = tl.load(x_ptr + sample * stride_xb + channel * stride_xc + at, mask=live, other=0.0).to(tl.float32)
    cond = cond_ptr + sample * stride_cond_b + channel * stride_cond_c + at
    pred = tl.load(cond, mask=live, other=0.0).to(tl.float32)
    if uncond_ptr is not None:  # noqa: SIM102  (known when compiling, the inner one is not)
        if channel < guided:
            uncond = uncond_ptr + sample * stride_uncond_b + channel * stride_uncond_c + at
            uncond = tl.load(uncond, mask=live, other=0.0).to(tl.float32)
            pred = uncond + scale * (pred - uncond)
    x0 = x0_x * x + x0_pred * pred
    if CLIP:
        # Not minimum and maximum, which would turn NaN into a number.
        x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))
    x_next = next_x0 * x0 + next_x * x + next_pred * pred
    if noise_ptr is not None:
        std = tl.load(coefficient + 5 * stride_n).to(tl.float32)
        if LEARNED:
            v = cond_ptr + sample * stride_cond_b + (channel + C) * stride_cond_c + at
            v = tl.load(v, mask=live, other=0.0).to(tl.float32)
            std = std * tl.exp(tl.load(coefficient + 6 * stride_n).to(tl.float32) * v)
        noise = tl.load(noise_ptr + sample * stride_noise_b + channel * stride_noise_c + at, mask=live, other=0.0)
        x_next += std * noise.to(tl.float32)
    out = (sample * C + channel) * positions + at
    tl.store(x_next_ptr + out, x_next, mask=live)
    if x0_ptr is not None:
        tl.store(x0_ptr + out, x0, mask=live)


def _flat(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """The tensor as (B, C, positions), dense in the last, and its other strides; (None, 0, 0) where there is none."""
    if tensor is None:
        return None, 0, 0
    flat = rows(tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(2))
    return flat, flat.stride(0), flat.stride(1)


def _guided_step_empty(
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    coefficients: torch.Tensor,
    scale: float,
    clip: bool,
    keep_x0: bool,
) -> tuple[torch.Tensor, ...]:
    """x_next and x_0, not yet written; x_0 without elements where it is not kept, since a raw op cannot return None."""
    dtype = torch.promote_types(x.dtype, coefficients.dtype)
    return tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape if keep_x0 else (0,)))


def _guided_step_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    coefficients: torch.Tensor,
    scale: float,
    clip: bool,
    keep_x0: bool,
) -> None:
    x_next, x0 = results
    B, C = x.shape[:2]
    positions = x.shape[2:].numel()
    block, warps = pick("guided_step_fwd", CONFIG, x, cond, uncond, noise)
    blocks = -(-positions // block)
    tensors, *strides = zip(*map(_flat, (x, cond, uncond, noise)), strict=True)
    launch(
        _guided_step_fwd_kernel,
        B * C * blocks,
        *(*tensors, coefficients, x_next, x0 if keep_x0 else None),
        *(scale, C, 0 if uncond is None else uncond.shape[1], positions, blocks),
        *(stride for pair in zip(*strides, strict=True) for stride in pair),
        *coefficients.stride(),
        LEARNED=coefficients.shape[1] == 7,
        CLIP=clip,
        BLOCK=block,
        num_warps=warps,
    )


_OP = Op(
    "guided_step",
    guided_step_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor cond, Tensor? uncond, Tensor? noise, Tensor coefficients",
        attrs="float scale, bool clip, bool keep_x0",
        outputs=("x_next", "x0"),
        saved=(),
        empty=_guided_step_empty,
        fwd=_guided_step_fwd,
        bwd=None,
    ),
)


def guided_step(
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    coefficients: torch.Tensor,
    scale: float = 1.0,
    clip: bool = False,
    keep_x0: bool = True,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x_next, x_0), both (B, C, ...), in the wider dtype of x and coefficients; x_0 is None where it is not kept.

    x, noise (B, C, ...); cond (B, C, ...) with coefficients (B, 6), or (B, 2C, ...) with (B, 7) for a learned variance;
    uncond (B, G, ...), G <= C the number of guided channels. ValueError for shapes that disagree or dtypes that are not
    floating; BackendError where the backend cannot run: "triton" also where a gradient is asked for.
    """
    tensors = {"x": x, "cond": cond, "uncond": uncond, "noise": noise, "coefficients": coefficients}
    space = " ".join(f"S{i}" for i in range(getattr(x, "ndim", 2) - 2))
    dims = {name: dims.replace("H W", space) for name, dims in DIMS.items()}
    sizes = check_dims(_OP.name, dims, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    check_number(_OP.name, "scale", scale)
    check_flag(_OP.name, "clip", clip)
    check_flag(_OP.name, "keep_x0", keep_x0)
    C, N, G = sizes["C"], sizes["N"], sizes.get("G", 1)
    if C == 0:
        raise ValueError(f"{_OP.name}: x has shape {tuple(x.shape)}, expected at least one channel")
    if N not in (6, 7):
        raise ValueError(
            f"{_OP.name}: coefficients has shape {tuple(coefficients.shape)}, expected (B, 6), or (B, 7) where the "
            "variance is learned"
        )
    if sizes["K"] != C * (N - 5):
        raise ValueError(
            f"{_OP.name}: cond has {sizes['K']} channels, expected {C * (N - 5)} for x of {C} channels and {N} "
            "coefficients a sample: 7 say that the variance is learned, 6 that it is not"
        )
    if not 1 <= G <= C:
        raise ValueError(f"{_OP.name}: uncond has {G} channels, expected 1 to {C} guided ones; slice it")
    x_next, x0 = _OP(backend, (x, cond, uncond, noise, coefficients), (scale, clip, keep_x0))
    return x_next, x0 if keep_x0 else None


# Guidance of the first 3 of 4 channels and a learned variance, as officially.
_OFFICIAL = {"B": 3, "C": 4, "K": 8, "G": 3, "H": 6, "W": 10, "N": 7}
_FIXED = {"K": 4, "N": 6}
# As the samplers call it: the network's output comes in float32 under every precision.
_LOOP: dict[str, Any] = {"mixed": True, "float32": ("cond", "uncond")}
_XL = _OFFICIAL | {"B": 32, "H": 32, "W": 32}

SPEC = OpSpec(
    op=_OP,
    fn=guided_step,
    dims=DIMS,
    cases=(
        Case("odd", _OFFICIAL, {"scale": 4.0}),
        Case("mixed", _OFFICIAL | {"B": 2, "H": 24, "W": 25}, {"scale": 1.5, "clip": True}, mixed=True),
        Case("fixed", _OFFICIAL | _FIXED | {"G": 4}, {"scale": 0.0, "clip": True}),
        Case("unguided", _OFFICIAL, {"clip": True}, absent=("uncond",)),
        Case("no_noise", _OFFICIAL | _FIXED, {"scale": 2.0}, absent=("noise",)),
        Case("neither", _OFFICIAL | _FIXED, {"keep_x0": False}, absent=("uncond", "noise")),
        Case("strided", _OFFICIAL | {"B": 2, "H": 5, "W": 7}, {"scale": 4.0}, strided=True),
        Case("empty", _OFFICIAL | {"B": 0}, {"scale": 4.0}),
        Case("one_position", _OFFICIAL | {"B": 5, "H": 1, "W": 1}, {"scale": 4.0}, full=True),
        Case("xl", _XL | {"B": 2}, {"scale": 4.0}, full=True),
    ),
    bench=(
        Case("DiT-XL/2", _XL, {"scale": 4.0, "keep_x0": False}, **_LOOP),
        Case("DiT-XL/2 with x_0", _XL, {"scale": 4.0, "clip": True}, **_LOOP),
        Case("DiT-XL/2 DDIM", _XL | _FIXED, {"scale": 4.0, "keep_x0": False}, **_LOOP, absent=("noise",)),
    ),
    stream=("x", "noise"),
    optional=("uncond", "noise"),
    float32=("coefficients",),
    shard=("B",),
)
