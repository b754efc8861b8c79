"""tokens = patches(x) weight^T + bias + pos_embed: the patch embedding, a convolution of stride p as one linear.

x            (B, C, H, W), H and W multiples of p
weight       (D, C, p, p), the convolution's; flattened, its input order is (c, p, q)
bias         (D)
pos_embed    (1, T, D), T = (H / p) (W / p), tokens row-major
Under autocast the linear runs in autocast's dtype and the sum with pos_embed promotes, as the official model's does.
"""

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating
from ._op import Op
from .spec import Case, OpSpec

DIMS = {"x": "B C H W", "weight": "D C p p", "bias": "D", "pos_embed": "1 T D"}


def patchify_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
    """The equation in plain PyTorch."""
    B, C, H, W = x.shape
    p = weight.shape[-1]
    patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.reshape(B, (H // p) * (W // p), C * p * p), weight.flatten(1), bias) + pos_embed


_OP = Op("patchify", patchify_ref)


def patchify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Tokens (B, T, D) of x (B, C, H, W); weight (D, C, p, p), bias (D), pos_embed (1, T, D) with T = (H / p) (W / p).

    ValueError for shapes that disagree, an image that p does not divide, or dtypes that are not floating.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "pos_embed": pos_embed}
    sizes = check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    H, W, p = sizes["H"], sizes["W"], sizes["p"]
    if H % p or W % p:
        raise ValueError(f"{_OP.name}: x is {H} x {W}, expected multiples of the patch size {p}; pad or crop it")
    if sizes["T"] != (H // p) * (W // p):
        raise ValueError(
            f"{_OP.name}: pos_embed has {sizes['T']} tokens, expected {(H // p) * (W // p)} for a {H} x {W} input in "
            f"patches of {p}; build the model for this input size"
        )
    return _OP(backend, (x, weight, bias, pos_embed))


SPEC = OpSpec(
    op=_OP,
    fn=patchify,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 3, "C": 3, "H": 6, "W": 10, "p": 2, "T": 15, "D": 24}),
        Case("strided", {"B": 2, "C": 4, "H": 8, "W": 4, "p": 4, "T": 2, "D": 33}, strided=True),
        Case("empty", {"B": 0, "C": 4, "H": 8, "W": 4, "p": 4, "T": 2, "D": 33}),
    ),
    bench=(Case("DiT-XL/2", {"B": 256, "C": 4, "H": 32, "W": 32, "p": 2, "T": 256, "D": 1152}),),
    flops=lambda inputs: 2 * inputs["x"].numel() * inputs["weight"].shape[0],
    shard=("B",),
)
