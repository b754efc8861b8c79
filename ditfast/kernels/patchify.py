"""tokens = patches(x) weight^T + bias + pos_embed: the patch embedding, a convolution of stride p as one linear.

x            (B, C, H, W), H and W multiples of p, all strides free
weight       (D, C, p, p), the convolution's; flattened, its input order is (c, p, q); copied unless contiguous
bias         (D)
pos_embed    (1, T, D), T = (H / p) (W / p), tokens row-major; the last dim dense (else it is copied)
tokens       (B, T, D), contiguous, in the wider dtype of the linear and pos_embed
Under autocast the linear runs in autocast's dtype and the sum with pos_embed promotes, as the official model's does.
fp32         the sums; the products too where the linear is in fp32, unless PyTorch's setting asks for TF32
saved        x, weight, bias, pos_embed

The forward is one launch: patches are gathered into a dot, and a program goes through several samples with its tiles of
pos_embed and weight, which else would cost as much traffic as the tokens. The backward is the reference's vjp by matrix
multiplies of the library: it runs once a step over B T D elements, and pos_embed and x need no gradient in a DiT.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating, check_out_dtype
from ._gemm import linear_dtype
from ._op import Kernels, Op
from ._rows import rows_per_program
from ._triton import jit, launch, rows, tl
from .autotune import pick
from .peers import diffusers_patchify
from .spec import Case, OpSpec, square
from .tf32 import dot_precision, tf32_fact

DIMS = {"x": "B C H W", "weight": "D C p p", "bias": "D", "pos_embed": "1 T D"}
# (tokens and columns of a tile, most inputs of a dot, samples of a program, warps). Not measured on a chip yet.
# Tiles of 64 tokens x 128 columns: the patches, read once per 128 columns, are 12 % of the tokens' bytes at 16 inputs
# a patch; with 16 samples a program pos_embed is 6 %. 8 warps hold its tile and the sums in 64 registers a thread.
CONFIG = (64, 128, 64, 16, 8)


def _patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """(B, T, C p p) of x (B, C, H, W)."""
    B, C, H, W = x.shape
    patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (H // p) * (W // p), C * p * p)


def patchify_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    compute: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The equation in plain PyTorch, the linear in `compute`."""
    patches, flat = _patches(x, weight.shape[-1]).to(compute), weight.flatten(1).to(compute)
    return (F.linear(patches, flat, bias.to(compute)) + pos_embed).to(out_dtype)


@jit
def _as(tile, DTYPE: tl.constexpr):
    """The tile in the dtype of that name."""
    if DTYPE == "float16":
        return tile.to(tl.float16)
    elif DTYPE == "bfloat16":
        return tile.to(tl.bfloat16)
    else:
        return tile.to(tl.float32)


@jit
def _patchify_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    y_ptr,
    B,
    T,
    w,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_bias,
    stride_pos,
    D: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token_blocks = (T + BLOCK_T - 1) // BLOCK_T
    col = (pid % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = (pid // column_blocks) % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    first = pid // column_blocks // token_blocks * SAMPLES
    live, inside = token < T, col < D
    both = live[:, None] & inside[None, :]
    added = tl.load(pos_ptr + token.to(tl.int64)[:, None] * stride_pos + col[None, :], mask=both, other=0.0)
    bias = tl.load(bias_ptr + col.to(tl.int64) * stride_bias, mask=inside, other=0.0).to(tl.float32)
    added = added.to(tl.float32) + bias[None, :]
    weight_col = weight_ptr + col.to(tl.int64)[None, :] * K
    k = tl.arange(0, BLOCK_K)
    if K <= BLOCK_K:
        weight = _as(tl.load(weight_col + k[:, None], mask=(k < K)[:, None] & inside[None, :], other=0.0), COMPUTE)
    corner = (token // w).to(tl.int64) * P * stride_xh + (token % w).to(tl.int64) * P * stride_xw

    for sample in range(first, tl.minimum(first + SAMPLES, B)):
        y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, K, BLOCK_K):
            kk = start + k
            inner = kk // (P * P) * stride_xc + (kk // P) % P * stride_xh + kk % P * stride_xw
            patch = x_ptr + tl.cast(sample, tl.int64) * stride_xb + corner[:, None] + inner[None, :]
            patch = _as(tl.load(patch, mask=live[:, None] & (kk < K)[None, :], other=0.0), COMPUTE)
            if K > BLOCK_K:
                weight = tl.load(weight_col + kk[:, None], mask=(kk < K)[:, None] & inside[None, :], other=0.0)
                weight = _as(weight, COMPUTE)
            y = tl.dot(patch, weight, y, input_precision=PRECISION)
        out_row = tl.cast(sample, tl.int64) * T + token
        tl.store(y_ptr + out_row[:, None] * D + col[None, :], y + added, mask=both)


def _patchify_empty(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    compute: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor]:
    """The tokens, not yet written."""
    return (torch.empty((x.shape[0], *pos_embed.shape[1:]), dtype=out_dtype, device=x.device),)


def _patchify_fwd(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    compute: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    (y,) = results
    B, T, D = y.shape
    p, K = weight.shape[-1], weight[0].numel()
    weight, pos_embed = weight.contiguous(), rows(pos_embed)
    facts = (x, weight, pos_embed, compute, out_dtype, *tf32_fact(compute))
    block_t, block_d, most_k, samples, warps = pick("patchify_fwd", CONFIG, *facts)
    blocks = -(-T // block_t) * -(-D // block_d)
    samples = rows_per_program(1, samples, blocks, B)
    meta = {
        **{"D": D, "K": K, "P": p, "SAMPLES": samples},
        **{"COMPUTE": str(compute).removeprefix("torch."), "PRECISION": dot_precision(compute)},
        **{"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_K": min(most_k, max(16, 1 << (K - 1).bit_length()))},
        "num_warps": warps,
    }
    strides = (*x.stride(), bias.stride(0), pos_embed.stride(1))
    args = (x, weight, bias, pos_embed, y, B, T, x.shape[3] // p, *strides)
    launch(_patchify_fwd_kernel, blocks * -(-B // samples), *args, **meta)


def _patchify_bwd(
    grads: tuple[torch.Tensor | None, ...],
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    compute: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    dx, dweight, dbias, dpos = grads
    B, C, H, W = x.shape
    D, p = weight.shape[0], weight.shape[-1]
    if dpos is not None or dbias is not None:
        over_samples = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if dpos is not None:
            dpos.copy_(over_samples.unsqueeze(0))
        if dbias is not None:
            dbias.copy_(over_samples.sum(0))
    if dweight is not None:
        patches = _patches(x, p).flatten(0, 1).to(dy.dtype)
        dweight.copy_((dy.reshape(-1, D).T @ patches).view(dweight.shape))
    if dx is not None:
        dpatches = (dy @ weight.flatten(1).to(dy.dtype)).reshape(B, H // p, W // p, C, p, p)
        dx.view(B, C, H // p, p, W // p, p).copy_(dpatches.permute(0, 3, 1, 4, 2, 5))


_OP = Op(
    "patchify",
    patchify_ref,
    kernels=Kernels(
        inputs="Tensor x, Tensor weight, Tensor bias, Tensor pos_embed",
        attrs="ScalarType compute, ScalarType out_dtype",
        outputs=("tokens",),
        saved=(),
        empty=_patchify_empty,
        fwd=_patchify_fwd,
        bwd=_patchify_bwd,
        skips=("x", "weight", "bias", "pos_embed"),
    ),
)


def patchify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Tokens (B, T, D) of x (B, C, H, W); weight (D, C, p, p), bias (D), pos_embed (1, T, D) with T = (H / p) (W / p).

    The linear computes in compute_dtype, by default autocast's, else the wider of x's and weight's.
    ValueError for shapes that disagree, an image that p does not divide, or dtypes that are not floating.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "pos_embed": pos_embed}
    sizes = check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    if compute_dtype is not None:
        check_out_dtype(_OP.name, compute_dtype, "compute_dtype")
        if compute_dtype.itemsize < 2:
            raise ValueError(f"{_OP.name}: compute_dtype is {compute_dtype}, expected one of 16 bits or more")
    H, W, p = sizes["H"], sizes["W"], sizes["p"]
    if H % p or W % p:
        raise ValueError(f"{_OP.name}: x is {H} x {W}, expected multiples of the patch size {p}; pad or crop it")
    if sizes["T"] != (H // p) * (W // p):
        raise ValueError(
            f"{_OP.name}: pos_embed has {sizes['T']} tokens, expected {(H // p) * (W // p)} for a {H} x {W} input in "
            f"patches of {p}; build the model for this input size"
        )
    compute = compute_dtype or linear_dtype(x, weight)
    return _OP(backend, (x, weight, bias, pos_embed), (compute, torch.promote_types(compute, pos_embed.dtype)))


def _resize(case: Case, sizes: Mapping[str, int]) -> Case:
    """H, W and T follow from each other: from T a square image."""
    new = {**case.sizes, **sizes}
    if "T" in sizes and not sizes.keys() & {"H", "W"}:
        new["H"] = new["W"] = square(new["T"]) * new["p"]
    elif "T" not in sizes:
        new["T"] = (new["H"] // new["p"]) * (new["W"] // new["p"])
    return replace(case, sizes=new)


_WIDE = ("x", "weight", "bias")
_XL = {"B": 256, "C": 4, "H": 32, "W": 32, "p": 2, "T": 256, "D": 1152}

SPEC = OpSpec(
    op=_OP,
    fn=patchify,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 3, "C": 3, "H": 6, "W": 10, "p": 2, "T": 15, "D": 24}),
        Case("strided", {"B": 2, "C": 4, "H": 8, "W": 4, "p": 4, "T": 2, "D": 33}, strided=True),
        Case("mixed", {"B": 2, "C": 3, "H": 8, "W": 6, "p": 2, "T": 12, "D": 40}, mixed=True),
        Case(
            "official",
            {"B": 3, "C": 3, "H": 6, "W": 10, "p": 2, "T": 15, "D": 40},
            mixed=True,
            float32=_WIDE,
            dtypes=("compute_dtype",),
        ),
        # More samples than one program takes, more inputs than one dot, more tokens and columns than one tile.
        Case("tiles", {"B": 19, "C": 3, "H": 10, "W": 70, "p": 5, "T": 28, "D": 130}),
        Case("many_tokens", {"B": 2, "C": 1, "H": 18, "W": 16, "p": 2, "T": 72, "D": 16}),
        Case("empty", {"B": 0, "C": 4, "H": 8, "W": 4, "p": 4, "T": 2, "D": 33}),
    ),
    bench=(
        Case("DiT-XL/2", _XL),
        Case("DiT-XL/2 official", _XL, mixed=True, float32=_WIDE, dtypes=("compute_dtype",)),
        Case("LargeDiT-3B", _XL | {"D": 3072}),
    ),
    stream=("pos_embed",),
    traffic=(Case("DiT-XL/2, 16 samples", _XL | {"B": CONFIG[3]}),),
    resize=_resize,
    flops=lambda inputs: 2 * inputs["x"].numel() * inputs["weight"].shape[0],
    shard=("B",),
    peers={"diffusers": diffusers_patchify},
)
