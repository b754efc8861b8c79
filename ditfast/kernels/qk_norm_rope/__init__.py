"""out = qkv, its q and k normed per head or over all, and rotated: QK-norm (arXiv:2302.05442), RoPE (arXiv:2104.09864).

z = n * weight + bias, n = x * rstd with rstd = 1 / sqrt(mean(x^2) + eps) ("rms") or n = (x - mean(x)) * rstd with
rstd = 1 / sqrt(var(x) + eps) ("layer"), over a head's channels, or with over "width" over those of all q's heads, and
of all k's; a pair (a, b) of a head's becomes (a cos - b sin, a sin + b cos), the angle its token's and its own. Each
step is left out where its arguments are None. Backwards dz is dout rotated back, and with g = dz * weight and means
over channels, sums over tokens, and over heads that share a weight:
dx = rstd * (g - mean(g) - n * mean(g * n)), mean(g) for "layer" alone,  dweight = sum(dz * n),  dbias = sum(dz).

qkv                 (B, T, N, head_dim): num_heads of q, then as many of k as of v; or (B, T, 3, H, head_dim), which is
                    that. Batch, token and head strides free, channels dense (else it is copied); dout likewise
q_weight, k_weight  (head_dim), None for ones; q_bias, k_bias (head_dim), None for zeros. Over "width" those of q are
                    (num_heads * head_dim), those of k (kv_heads * head_dim)
cos, sin            (T, head_dim / 2), of the angles; constants without gradient. Both None: no rotation
out                 contiguous, in qkv's shape and dtype
dtypes              float32, bfloat16, float16, each tensor its own; head_dim even, up to 256; over "width" num_heads *
                    head_dim up to 8192, both as powers of two
fp32                all arithmetic, the partial sums of dweight and dbias: one rounding per stored value
saved               qkv and the other inputs

The result is a new packed tensor: attention takes it as it is and hands a packed gradient back. Written in place, qkv
would be lost to the norm's backward; without v in it the three gradients would have to be gathered, a pass over all.
head.py and width.py hold the kernels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .._checks import check_dims, check_even_heads, check_flag, check_floating, check_number, is_whole
from .._op import Kernels, Op
from .._rows import empty_partials, laid_out, sum_partials
from .._triton import launch
from ..peers import flash_attn_qk_norm_rope, liger_qk_norm_rope
from ..spec import Case, OpSpec
from . import head, width
from .head import qk_norm_rope_bwd_kernel, qk_norm_rope_fwd_kernel
from .reference import qk_norm_rope_ref
from .width import qk_norm_rope_width_bwd_kernel, qk_norm_rope_width_fwd_kernel

DIMS = {
    **{"qkv": "B T N head_dim", "q_weight": "q_channels", "k_weight": "k_channels", "q_bias": "q_channels"},
    **{"k_bias": "k_channels", "cos": "T half", "sin": "T half"},
}
NORMS = ("none", "rms", "layer")
OVER = ("head", "width")
_PARAMETERS, _BIASES = ("q_weight", "k_weight", "q_bias", "k_bias"), ("q_bias", "k_bias")


def _empty(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor]:
    """out, not yet written."""
    return (torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),)


def _tiling(
    kernel: str, qkv: torch.Tensor, num_heads: int, norm: str, interleaved: bool, over: str
) -> tuple[int, int, dict[str, Any]]:
    """(chunks of tokens per sample, programs, constants of the launch)."""
    B, _, N, head_dim = qkv.shape
    half = head_dim // 2
    chunks, meta = (width if over == "width" else head).tiling(kernel, qkv, num_heads, norm, interleaved)
    meta |= {"HEADS": num_heads, "KV_HEADS": (N - num_heads) // 2, "NORM": norm, "INTERLEAVED": interleaved}
    return chunks, 3 * B * chunks, meta | {"HALF": half, "PAIRS": 1 << (half - 1).bit_length()}


def _fwd(results: tuple[torch.Tensor, ...], qkv: torch.Tensor, *rest: Any) -> None:
    *others, num_heads, norm, eps, interleaved, over = rest
    chunks, programs, meta = _tiling("fwd", qkv, num_heads, norm, interleaved, over)
    tensors, strides = laid_out(*zip((qkv, *others), (4, 1, 1, 1, 1, 2, 2), strict=True))
    kernel = qk_norm_rope_width_fwd_kernel if over == "width" else qk_norm_rope_fwd_kernel
    launch(kernel, programs, *tensors, *results, qkv.shape[1], chunks, eps, *strides, **meta)


def _bwd(grads: tuple[torch.Tensor, ...], dout: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> None:
    *others, num_heads, norm, eps, interleaved, over = rest
    B, T, N, head_dim = qkv.shape
    chunks, programs, meta = _tiling("bwd", qkv, num_heads, norm, interleaved, over)
    parameters, tables = others[:4], others[4:]
    tensors, strides = laid_out(*zip((dout, qkv, *parameters[:2], *tables), (4, 4, 1, 1, 2, 2), strict=True))
    graded = any(parameter is not None for parameter in parameters)
    channels = _channels(N, head_dim, num_heads, over)
    partials = [empty_partials(B, chunks, 2, each, qkv.device) if graded else None for each in channels]
    kernel = qk_norm_rope_width_bwd_kernel if over == "width" else qk_norm_rope_bwd_kernel
    launch(kernel, programs, *tensors, grads[0], *partials, T, chunks, eps, *strides, **meta)
    for i, partial in enumerate(partials):
        if partial is not None:
            given = zip(parameters[i::2], grads[1 + i : 5 : 2], strict=True)
            unwanted = partial.new_empty((1, channels[i]))
            sum_partials(partial, *(unwanted if p is None else dp.view(1, -1) for p, dp in given))


def _channels(N: int, head_dim: int, num_heads: int, over: str) -> tuple[int, int]:
    """Channels of one norm of q, and of k."""
    return (num_heads * head_dim, (N - num_heads) // 2 * head_dim) if over == "width" else (head_dim, head_dim)


_OP = Op(
    "qk_norm_rope",
    qk_norm_rope_ref,
    kernels=Kernels(
        inputs=", ".join(("Tensor qkv", *(f"Tensor? {name}" for name in tuple(DIMS)[1:]))),
        attrs="int num_heads, str norm, float eps, bool interleaved, str over",
        outputs=("out",),
        saved=(),
        empty=_empty,
        fwd=_fwd,
        bwd=_bwd,
        constants=("cos", "sin"),
    ),
)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    num_heads: int | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    interleaved: bool = True,
    over: str = "head",
    backend: str = "auto",
) -> torch.Tensor:
    """qkv, in its shape and dtype, with q and k normed ("none", "rms", "layer") and rotated by cos and sin.

    qkv (B, T, num_heads + 2 kv_heads, head_dim), or (B, T, 3, H, head_dim) without num_heads; cos and sin
    (T, head_dim / 2). over: a norm is of each "head", weights and biases (head_dim), or of q's, and of k's, whole
    "width", as in LargeDiT: q's (num_heads * head_dim), k's (kv_heads * head_dim). interleaved: the pairs are
    neighbours (2 i, 2 i + 1), as in llama and LightningDiT, else (i, i + head_dim / 2). ValueError for shapes, a norm
    or a combination that is not one of these.
    """
    packed = qkv
    if isinstance(qkv, torch.Tensor) and qkv.ndim == 5 and qkv.shape[2] == 3:
        check_even_heads(_OP.name, num_heads, qkv.shape[3])
        num_heads, qkv = qkv.shape[3], qkv.flatten(2, 3)
    tensors = dict(zip(DIMS, (qkv, q_weight, k_weight, q_bias, k_bias, cos, sin), strict=True))
    sizes = check_dims(_OP.name, DIMS, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    _check_arguments(sizes, tensors, num_heads, norm, over)
    check_number(_OP.name, "eps", eps)
    check_flag(_OP.name, "interleaved", interleaved)
    out = _OP(backend, tuple(tensors.values()), (num_heads, norm, eps, interleaved, over))
    return out.view_as(packed) if packed.ndim == 5 else out


def _check_arguments(
    sizes: dict[str, int], tensors: dict[str, torch.Tensor | None], num_heads: int | None, norm: str, over: str
) -> None:
    """ValueError for heads that do not add up, half a table, or parameters of a norm that has none."""
    N, head_dim = sizes["N"], sizes["head_dim"]
    if not is_whole(num_heads) or not 0 < num_heads < N or (N - num_heads) % 2:
        raise ValueError(
            f"{_OP.name}: num_heads is {num_heads!r} and qkv has {N} heads, expected num_heads + 2 kv_heads; pass the "
            "number of q's heads"
        )
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"{_OP.name}: qkv has head_dim {head_dim}, expected an even one")
    if norm not in NORMS:
        raise ValueError(f"{_OP.name}: norm is {norm!r}, expected one of {', '.join(map(repr, NORMS))}")
    if over not in OVER or (over, norm) == ("width", "none"):
        raise ValueError(f"{_OP.name}: over is {over!r} of norm {norm!r}, expected 'head', or 'width' of another norm")
    unused = {"none": tuple(DIMS)[1:5], "rms": ("q_bias", "k_bias"), "layer": ()}[norm]
    if given := [name for name in unused if tensors[name] is not None]:
        raise ValueError(f"{_OP.name}: {given[0]} is given, but norm {norm!r} has none, expected None")
    for name, channels in zip(_PARAMETERS, 2 * _channels(N, head_dim, num_heads, over), strict=True):
        parameter = tensors[name]
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(
                f"{_OP.name}: {name} has shape {tuple(parameter.shape)}, expected ({channels},) with over={over!r}, "
                f"{num_heads} of {N} heads being q's; over='head' takes parameters of one head, 'width' those of all"
            )
    cos, sin = tensors["cos"], tensors["sin"]
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP.name}: one of cos and sin is None, expected both or neither")
    if cos is not None and sizes["half"] != head_dim // 2:
        raise ValueError(f"{_OP.name}: cos has shape {tuple(cos.shape)}, expected (T, {head_dim // 2})")
    if any(table is not None and table.requires_grad for table in (cos, sin)):
        raise ValueError(f"{_OP.name}: cos or sin requires a gradient, expected constants; detach them")


def _sizes(B: int, T: int, N: int, head_dim: int, num_heads: int | None = None) -> dict[str, int]:
    """With num_heads those of norms over the width."""
    channels = _channels(N, head_dim, num_heads or 0, "width" if num_heads else "head")
    tokens = {"B": B, "T": T, "N": N, "head_dim": head_dim, "half": head_dim // 2}
    return tokens | dict(zip(("q_channels", "k_channels"), channels, strict=True))


def _resize(case: Case, sizes: Mapping[str, int]) -> Case:
    """The case with other heads or tokens; ValueError for sizes that contradict each other."""
    wanted, num_heads = {**case.sizes, **sizes}, case.kwargs["num_heads"]
    over_width = case.kwargs.get("over") == "width"
    B, T, N, head_dim = (wanted[name] for name in ("B", "T", "N", "head_dim"))
    if not num_heads < N or (N - num_heads) % 2:
        raise ValueError(f"{N} heads are not {num_heads} of q and as many of k as of v")
    found = _sizes(B, T, N, head_dim, num_heads if over_width else None)
    if wrong := [name for name, size in sizes.items() if found[name] != size]:
        raise ValueError(f"{wrong[0]} follows from the heads, it is {found[wrong[0]]}")
    return replace(case, sizes=found)


_LAYER, _RMS, _HALVES = {"norm": "layer"}, {"norm": "rms"}, {"interleaved": False}
_WIDTH = {"over": "width"}
_LARGE = {"num_heads": 32, "eps": 1e-5} | _LAYER | _WIDTH

SPEC = OpSpec(
    op=_OP,
    fn=qk_norm_rope,
    dims=DIMS,
    cases=(
        Case("odd", _sizes(2, 19, 4, 24), {"num_heads": 2} | _LAYER),
        Case("mixed", _sizes(2, 18, 4, 72), {"num_heads": 2} | _RMS, mixed=True, absent=_BIASES),
        Case("rope_only", _sizes(2, 9, 4, 32), {"num_heads": 2} | _HALVES, absent=_PARAMETERS),
        Case("norm_only", _sizes(2, 7, 5, 10), {"num_heads": 3} | _LAYER, absent=("cos", "sin", "q_bias", "k_weight")),
        Case(
            "strided",
            _sizes(2, 17, 4, 48),
            {"num_heads": 2, "eps": 1e-2} | _RMS | _HALVES,
            strided=True,
            absent=_BIASES,
        ),
        Case("empty", _sizes(0, 5, 3, 16), {"num_heads": 1} | _LAYER),
        Case("long", _sizes(2, 67, 3, 72), {"num_heads": 1} | _LAYER, full=True),
        Case("width", _sizes(2, 9, 5, 24, 3), {"num_heads": 3} | _LAYER | _WIDTH),
        Case("width_mixed", _sizes(2, 5, 8, 10, 4), {"num_heads": 4} | _LAYER | _WIDTH | _HALVES, mixed=True),
        Case(
            "width_norm_only",
            _sizes(3, 3, 4, 36, 2),
            {"num_heads": 2} | _LAYER | _WIDTH,
            absent=("cos", "sin", "q_bias", "k_weight"),
        ),
        Case(
            "width_strided",
            _sizes(2, 5, 7, 18, 3),
            {"num_heads": 3, "eps": 1e-2} | _RMS | _WIDTH,
            strided=True,
            absent=_BIASES,
        ),
        Case("width_4096", _sizes(2, 2, 96, 128, 32), _LARGE),
        Case("width_empty", _sizes(0, 5, 4, 16, 2), {"num_heads": 2} | _LAYER | _WIDTH),
        Case("width_long", _sizes(2, 67, 6, 72, 4), {"num_heads": 4} | _LAYER | _WIDTH, full=True),
    ),
    bench=(
        Case("DiT-XL/2, LightningDiT's", _sizes(256, 256, 48, 72), {"num_heads": 16} | _RMS, absent=_BIASES),
        Case("DiT-XL/2, LayerNorm, halves", _sizes(256, 256, 48, 72), {"num_heads": 16} | _LAYER | _HALVES),
        Case("LargeDiT-3B", _sizes(256, 256, 96, 96), {"num_heads": 32}, absent=_PARAMETERS),
        Case("LargeDiT-600M", _sizes(256, 256, 96, 48, 32), _LARGE),
        Case("LargeDiT-7B", _sizes(256, 256, 96, 128, 32), _LARGE),
    ),
    traffic=(
        Case("8 heads, 64 tokens", _sizes(2, 64, 24, 72), {"num_heads": 8} | _RMS, absent=_BIASES),
        Case("LargeDiT-600M, 64 tokens", _sizes(1, 64, 96, 48, 32), _LARGE),
    ),
    stream=(*_PARAMETERS, "cos", "sin"),
    optional=_PARAMETERS,
    shard=("B",),
    recompute=("out",),
    bwd_unread=_BIASES,
    peers={"liger-kernel": liger_qk_norm_rope, "flash-attn": flash_attn_qk_norm_rope},
    resize=_resize,
    forms=("width",),
)
