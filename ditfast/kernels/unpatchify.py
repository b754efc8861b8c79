"""image = tokens back in place: the output of the final layer, (p, q, c) inside a token, as (B, C, H, W).

y      (B, T, p p C), T = h w tokens, row-major
image  (B, C, h p, w p), in y's dtype
The order inside a token, (p, q, c), is not the (c, p, q) that `patchify` reads: so it is in the official DiT.
"""

import torch

from ._checks import check_dims, check_floating
from ._op import Op
from .spec import Case, OpSpec

DIMS = {"y": "B T E"}


def unpatchify_ref(y: torch.Tensor, patch_size: int, h: int, w: int) -> torch.Tensor:
    """The rearrangement in plain PyTorch."""
    p = patch_size
    C = y.shape[2] // (p * p)
    return y.reshape(y.shape[0], h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(y.shape[0], C, h * p, w * p)


_OP = Op("unpatchify", unpatchify_ref)


def unpatchify(y: torch.Tensor, patch_size: int, grid: tuple[int, int], *, backend: str = "auto") -> torch.Tensor:
    """Image (B, C, h p, w p) of y (B, h w, p p C), p = patch_size and (h, w) = grid; ValueError where they disagree."""
    sizes = check_dims(_OP.name, DIMS, {"y": y})
    check_floating(_OP.name, {"y": y})
    h, w = grid
    if sizes["T"] != h * w:
        raise ValueError(f"{_OP.name}: y has {sizes['T']} tokens, expected {h * w} for a grid of {h} x {w}")
    if sizes["E"] % (patch_size * patch_size):
        raise ValueError(f"{_OP.name}: y is {sizes['E']} wide, expected a multiple of patch_size^2 = {patch_size**2}")
    return _OP(backend, (y,), (patch_size, h, w))


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
)
