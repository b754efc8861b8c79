"""image = tokens back in place: the output of the final layer, (p, q, c) inside a token, as (B, C, H, W).

y      (B, T, p p C), T = h w tokens, row-major; all strides free, of dimage too
image  (B, C, h p, w p), contiguous, in y's dtype
The order inside a token, (p, q, c), is not the (c, p, q) that `patchify` reads: so it is in the official DiT.

A program moves one row of tokens, so that what it reads and writes of each cache line stays within it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ._checks import check_dims, check_floating, check_whole
from ._op import Kernels, Op
from ._triton import jit, launch, tl
from .autotune import pick
from .spec import Case, OpSpec, square

DIMS = {"y": "B T E"}
# (elements of a tile, warps). A row of DiT-XL/2 at 256 pixels has 512 elements, at 512 pixels 1024; 4 to 8 a thread.
# Not measured on a chip yet.
CONFIG = (1024, 4)


def unpatchify_ref(y: torch.Tensor, patch_size: int, h: int, w: int) -> torch.Tensor:
    """The rearrangement in plain PyTorch."""
    p = patch_size
    C = y.shape[2] // (p * p)
    return y.reshape(y.shape[0], h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(y.shape[0], C, h * p, w * p)


@jit
def _unpatchify_fwd_kernel(
    y_ptr,
    image_ptr,
    h,
    w,
    stride_yb,
    stride_yt,
    stride_ye,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // h).to(tl.int64)
    i = pid % h
    W = w * P
    for start in range(0, C * P * W, BLOCK):
        # In the order of the image: channel, row of the patch, column.
        element = start + tl.arange(0, BLOCK)
        live = element < C * P * W
        x = element % W
        p = (element // W) % P
        c = element // (W * P)
        token = (i * w + x // P).to(tl.int64)
        y = y_ptr + sample * stride_yb + token * stride_yt + ((p * P + x % P) * C + c) * stride_ye
        image = image_ptr + ((sample * C + c) * h + i) * (P * W) + p * W + x
        tl.store(image, tl.load(y, mask=live), mask=live)


@jit
def _unpatchify_bwd_kernel(
    dimage_ptr,
    dy_ptr,
    h,
    w,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // h).to(tl.int64)
    i = pid % h
    E: tl.constexpr = C * P * P
    for start in range(0, w * E, BLOCK):
        # In the order of the tokens: token, row and column of the patch, channel.
        element = start + tl.arange(0, BLOCK)
        live = element < w * E
        c = element % C
        x = element // E * P + (element // C) % P
        row = (i * P + (element // (C * P)) % P).to(tl.int64)
        dimage = dimage_ptr + sample * stride_db + c.to(tl.int64) * stride_dc + row * stride_dh + x * stride_dw
        tl.store(dy_ptr + pid.to(tl.int64) * w * E + element, tl.load(dimage, mask=live), mask=live)


def _meta(kernel: str, y: torch.Tensor, p: int, h: int) -> dict[str, int]:
    """The constants of a launch."""
    block, warps = pick(kernel, CONFIG, y, p, h)
    return {"C": y.shape[2] // (p * p), "P": p, "BLOCK": block, "num_warps": warps}


def _unpatchify_empty(y: torch.Tensor, patch_size: int, h: int, w: int) -> tuple[torch.Tensor]:
    """The image, not yet written."""
    p = patch_size
    return (torch.empty((y.shape[0], y.shape[2] // (p * p), h * p, w * p), dtype=y.dtype, device=y.device),)


def _unpatchify_fwd(results: tuple[torch.Tensor, ...], y: torch.Tensor, patch_size: int, h: int, w: int) -> None:
    meta = _meta("unpatchify_fwd", y, patch_size, h)
    launch(_unpatchify_fwd_kernel, y.shape[0] * h, y, *results, h, w, *y.stride(), **meta)


def _unpatchify_bwd(
    grads: tuple[torch.Tensor, ...], dimage: torch.Tensor, y: torch.Tensor, patch_size: int, h: int, w: int
) -> None:
    meta = _meta("unpatchify_bwd", y, patch_size, h)
    launch(_unpatchify_bwd_kernel, dimage.shape[0] * h, dimage, *grads, h, w, *dimage.stride(), **meta)


_OP = Op(
    "unpatchify",
    unpatchify_ref,
    kernels=Kernels(
        inputs="Tensor y",
        attrs="int patch_size, int h, int w",
        outputs=("image",),
        saved=(),
        empty=_unpatchify_empty,
        fwd=_unpatchify_fwd,
        bwd=_unpatchify_bwd,
    ),
)


def unpatchify(y: torch.Tensor, patch_size: int, grid: tuple[int, int], *, backend: str = "auto") -> torch.Tensor:
    """Image (B, C, h p, w p) of y (B, h w, p p C), p = patch_size and (h, w) = grid; ValueError where they disagree."""
    sizes = check_dims(_OP.name, DIMS, {"y": y})
    check_floating(_OP.name, {"y": y})
    check_whole(_OP.name, "patch_size", patch_size, 1)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"{_OP.name}: grid is {grid!r}, expected (h, w), the patches along each side")
    h, w = grid
    for name, side in (("h", h), ("w", w)):
        check_whole(_OP.name, f"{name} of grid", side, 0)
    if sizes["T"] != h * w:
        raise ValueError(f"{_OP.name}: y has {sizes['T']} tokens, expected {h * w} for a grid of {h} x {w}")
    if sizes["E"] % (patch_size * patch_size):
        raise ValueError(f"{_OP.name}: y is {sizes['E']} wide, expected a multiple of patch_size^2 = {patch_size**2}")
    return _OP(backend, (y,), (patch_size, h, w))


def _resize(case: Case, sizes: Mapping[str, int]) -> Case:
    """The grid follows from T, a square one."""
    grid = {"grid": (square(sizes["T"]),) * 2} if "T" in sizes else {}
    return replace(case, sizes={**case.sizes, **sizes}, kwargs={**case.kwargs, **grid})


SPEC = OpSpec(
    op=_OP,
    fn=unpatchify,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 3, "T": 15, "E": 12}, {"patch_size": 2, "grid": (3, 5)}),
        Case("strided", {"B": 2, "T": 2, "E": 64}, {"patch_size": 4, "grid": (1, 2)}, strided=True),
        Case("empty", {"B": 0, "T": 2, "E": 64}, {"patch_size": 4, "grid": (1, 2)}),
    ),
    bench=(Case("DiT-XL/2", {"B": 256, "T": 256, "E": 32}, {"patch_size": 2, "grid": (16, 16)}),),
    shard=("B",),
    bwd_unread=("y",),
    resize=_resize,
)
