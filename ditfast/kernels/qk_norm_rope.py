"""out = qkv, its q and k normed per head and rotated by position: QK-norm (arXiv:2302.05442), RoPE (arXiv:2104.09864).

z = n * weight + bias, n = x * rstd with rstd = 1 / sqrt(mean(x^2) + eps) ("rms") or n = (x - mean(x)) * rstd with
rstd = 1 / sqrt(var(x) + eps) ("layer"), over a head's channels; a pair (a, b) of them becomes
(a cos - b sin, a sin + b cos), the angle its token's and its own. Each step is left out where its arguments are None.
Backwards dz is dout rotated back, and with g = dz * weight and means over channels, sums over tokens and heads:
dx = rstd * (g - mean(g) - n * mean(g * n)), mean(g) for "layer" alone,  dweight = sum(dz * n),  dbias = sum(dz).

qkv                 (B, T, N, head_dim): num_heads of q, then as many of k as of v; or (B, T, 3, H, head_dim), which is
                    that. Batch, token and head strides free, channels dense (else it is copied); dout likewise
q_weight, k_weight  (head_dim), None for ones; q_bias, k_bias (head_dim), None for zeros
cos, sin            (T, head_dim / 2), of the angles; constants without gradient. Both None: no rotation
out                 contiguous, in qkv's shape and dtype
dtypes              float32, bfloat16, float16, each tensor its own; head_dim even, up to 256
fp32                all arithmetic, the partial sums of dweight and dbias: one rounding per stored value
saved               qkv and the other inputs

The result is a new packed tensor: attention takes it as it is and hands a packed gradient back. Written in place, qkv
would be lost to the norm's backward; without v in it the three gradients would have to be gathered, a pass over all.
A program owns a chunk of one sample's tokens and one of q, k, v, holds its cos and sin for all heads, and writes one
partial row of dweight and dbias, which _rows.py adds up.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_flag, check_floating, check_number
from ._heads import load_angles, load_pairs, load_parameter, norm_pairs, section_of, store_pairs
from ._op import Kernels, Op
from ._rows import empty_partials, rows_per_program, sum_partials
from ._triton import jit, launch, rows, tl
from .autotune import pick
from .peers import flash_attn_qk_norm_rope, liger_qk_norm_rope
from .spec import Case, OpSpec

DIMS = {
    **{"qkv": "B T N head_dim", "q_weight": "head_dim", "k_weight": "head_dim", "q_bias": "head_dim"},
    **{"k_bias": "head_dim", "cos": "T half", "sin": "T half"},
}
NORMS = ("none", "rms", "layer")

# Not measured on a chip yet. A tile is 16 tokens of one head, 8 elements of each tensor a thread at head_dim 64; up to
# 64 tokens of all heads share one partial row, and the cos and sin of 16 are read once for all heads.
BLOCK_T, ROWS, WARPS = 16, 64, 4


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    """The equation in plain PyTorch, the norm in the wider dtype of its operands."""

    def normed(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        wide = x
        for other in (weight, bias):
            wide = wide if other is None else wide.to(torch.promote_types(wide.dtype, other.dtype))
        weight, bias = (None if other is None else other.to(wide.dtype) for other in (weight, bias))
        if norm == "layer":
            return F.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
        return F.rms_norm(wide, wide.shape[-1:], weight, eps) if norm == "rms" else wide

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if cos is None or sin is None:
            return x
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        pair = a * c - b * s, a * s + b * c
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    kv_heads = (qkv.shape[2] - num_heads) // 2
    q, k, v = qkv.split((num_heads, kv_heads, kv_heads), 2)
    q, k = rotated(normed(q, q_weight, q_bias)), rotated(normed(k, k_weight, k_bias))
    return torch.cat((q.to(qkv.dtype), k.to(qkv.dtype), v), 2)


@jit
def _qk_norm_rope_fwd_kernel(
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    T,
    chunks,
    eps,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    pid = tl.program_id(0)
    section, first_head, heads = section_of(pid, HEADS, KV_HEADS)
    sample = (pid // 3 // chunks).to(tl.int64)
    first = (pid // 3 % chunks) * ROWS
    weight_a, weight_b = load_parameter(q_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    bias_a, bias_b = load_parameter(q_bias_ptr, 0.0, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = load_parameter(k_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
        bias_a, bias_b = load_parameter(k_bias_ptr, 0.0, HALF, PAIRS, INTERLEAVED)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, section, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, section, T, HALF, PAIRS)
        for h in range(0, heads):
            head = first_head + h
            x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
            out_row = out_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if NORM != "none":
                    a, b, _ = norm_pairs(a, b, eps, HALF, PAIRS, NORM)
                    a, b = a * weight_a + bias_a, b * weight_b + bias_b
                if cos_ptr is not None:
                    a, b = a * cos - b * sin, a * sin + b * cos
            store_pairs(out_row, a, b, live, HALF, PAIRS, INTERLEAVED)


@jit
def _qk_norm_rope_bwd_kernel(
    dout_ptr,
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    partial_ptr,
    T,
    chunks,
    eps,
    stride_dout_b,
    stride_dout_t,
    stride_dout_h,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    N: tl.constexpr = HEADS + 2 * KV_HEADS
    pid = tl.program_id(0)
    section, first_head, heads = section_of(pid, HEADS, KV_HEADS)
    chunk = (pid // 3).to(tl.int64)
    sample = chunk // chunks
    first = (pid // 3 % chunks) * ROWS
    weight_a, weight_b = load_parameter(q_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = load_parameter(k_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    dweight_a = tl.zeros([1, PAIRS], tl.float32)
    dweight_b = tl.zeros([1, PAIRS], tl.float32)
    dbias_a = tl.zeros([1, PAIRS], tl.float32)
    dbias_b = tl.zeros([1, PAIRS], tl.float32)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            cos = load_angles(cos_ptr, token, stride_cos, section, T, HALF, PAIRS)
            sin = load_angles(sin_ptr, token, stride_sin, section, T, HALF, PAIRS)
        for h in range(0, heads):
            head = first_head + h
            dout_row = dout_ptr + sample * stride_dout_b + token64 * stride_dout_t + head * stride_dout_h
            dx_row = dx_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            da, db = load_pairs(dout_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if cos_ptr is not None:
                    da, db = da * cos + db * sin, db * cos - da * sin
                if NORM != "none":
                    x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
                    a, b = load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
                    a, b, rstd = norm_pairs(a, b, eps, HALF, PAIRS, NORM)
                    dweight_a += tl.sum(da * a, 0)[None, :]
                    dweight_b += tl.sum(db * b, 0)[None, :]
                    dbias_a += tl.sum(da, 0)[None, :]
                    dbias_b += tl.sum(db, 0)[None, :]
                    da, db = da * weight_a, db * weight_b
                    gn = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF))[:, None]
                    g = 0.0
                    if NORM == "layer":
                        g = ((tl.sum(da, 1) + tl.sum(db, 1)) / (2 * HALF))[:, None]
                    da, db = (da - g - a * gn) * rstd, (db - g - b * gn) * rstd
            store_pairs(dx_row, da, db, live, HALF, PAIRS, INTERLEAVED)

    if partial_ptr is not None:
        # (2, chunks of all samples, 2, head_dim): q's rows before k's, none of v's.
        row = section * (tl.num_programs(0) // 3) + chunk
        one = tl.arange(0, 1)
        at = partial_ptr + row * (4 * HALF) + one
        store_pairs(at, dweight_a, dweight_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)
        store_pairs(at + 2 * HALF, dbias_a, dbias_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)


def _tiling(kernel: str, qkv: torch.Tensor, num_heads: int, norm: str, interleaved: bool) -> tuple[int, dict[str, Any]]:
    """(chunks of tokens per sample, constants of the launch)."""
    B, T, N, head_dim = qkv.shape
    if head_dim > 256:
        raise ValueError(f"{_OP.name}: head_dim is {head_dim}, the kernels take up to 256; use backend='reference'")
    tile, most, warps = pick(kernel, (BLOCK_T, ROWS, WARPS), qkv, num_heads, norm, interleaved)
    per_program = rows_per_program(tile, most, 3 * B, T)
    half = head_dim // 2
    return -(-T // per_program), {
        **{"HEADS": num_heads, "KV_HEADS": (N - num_heads) // 2, "HALF": half, "PAIRS": 1 << (half - 1).bit_length()},
        **{"NORM": norm, "INTERLEAVED": interleaved, "BLOCK_T": tile, "ROWS": per_program, "num_warps": warps},
    }


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else rows(vector)


def _qk_norm_rope_empty(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor]:
    """out, not yet written."""
    return (torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),)


def _qk_norm_rope_fwd(results: tuple[torch.Tensor, ...], qkv: torch.Tensor, *rest: Any) -> None:
    *others, num_heads, norm, eps, interleaved = rest
    chunks, meta = _tiling("qk_norm_rope_fwd", qkv, num_heads, norm, interleaved)
    qkv, others = rows(qkv), [_dense(other) for other in others]
    strides = (*qkv.stride()[:3], *(0 if table is None else table.stride(0) for table in others[4:]))
    args = (qkv, *others, *results, qkv.shape[1], chunks, eps, *strides)
    launch(_qk_norm_rope_fwd_kernel, 3 * qkv.shape[0] * chunks, *args, **meta)


def _qk_norm_rope_bwd(grads: tuple[torch.Tensor, ...], dout: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> None:
    *others, num_heads, norm, eps, interleaved = rest
    B, T, _, head_dim = qkv.shape
    chunks, meta = _tiling("qk_norm_rope_bwd", qkv, num_heads, norm, interleaved)
    dout, qkv, parameters = rows(dout), rows(qkv), others[:4]
    weights, tables = [_dense(w) for w in others[:2]], [_dense(table) for table in others[4:]]
    graded = any(parameter is not None for parameter in parameters)
    partial = empty_partials(2 * B, chunks, 2, head_dim, qkv.device) if graded else None
    table_strides = (0 if table is None else table.stride(0) for table in tables)
    strides = (*dout.stride()[:3], *qkv.stride()[:3], *table_strides)
    args = (dout, qkv, *weights, *tables, grads[0], partial, T, chunks, eps, *strides)
    launch(_qk_norm_rope_bwd_kernel, 3 * B * chunks, *args, **meta)
    if partial is not None:
        unwanted = partial.new_empty((1, head_dim))
        wanted = [unwanted if p is None else dp.view(1, -1) for p, dp in zip(parameters, grads[1:5], strict=True)]
        for i in range(2):
            sum_partials(partial[i * B * chunks : (i + 1) * B * chunks], wanted[i], wanted[2 + i])


_OP = Op(
    "qk_norm_rope",
    qk_norm_rope_ref,
    kernels=Kernels(
        inputs=", ".join(("Tensor qkv", *(f"Tensor? {name}" for name in tuple(DIMS)[1:]))),
        attrs="int num_heads, str norm, float eps, bool interleaved",
        outputs=("out",),
        saved=(),
        empty=_qk_norm_rope_empty,
        fwd=_qk_norm_rope_fwd,
        bwd=_qk_norm_rope_bwd,
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
    backend: str = "auto",
) -> torch.Tensor:
    """qkv, in its shape and dtype, with q and k normed ("none", "rms", "layer") per head and rotated by cos and sin.

    qkv (B, T, num_heads + 2 kv_heads, head_dim), or (B, T, 3, H, head_dim) without num_heads; the weights and biases
    (head_dim), cos and sin (T, head_dim / 2). interleaved: the pairs are neighbours (2 i, 2 i + 1), as in llama and
    LightningDiT, else (i, i + head_dim / 2). ValueError for shapes, a norm or a combination that is not one of these.
    """
    packed = qkv
    if isinstance(qkv, torch.Tensor) and qkv.ndim == 5 and qkv.shape[2] == 3 and num_heads in (None, qkv.shape[3]):
        num_heads, qkv = qkv.shape[3], qkv.flatten(2, 3)
    tensors = dict(zip(DIMS, (qkv, q_weight, k_weight, q_bias, k_bias, cos, sin), strict=True))
    sizes = check_dims(_OP.name, DIMS, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    _check_arguments(sizes, tensors, num_heads, norm)
    check_number(_OP.name, "eps", eps)
    check_flag(_OP.name, "interleaved", interleaved)
    out = _OP(backend, tuple(tensors.values()), (num_heads, norm, eps, interleaved))
    return out.view_as(packed) if packed.ndim == 5 else out


def _check_arguments(
    sizes: dict[str, int], tensors: dict[str, torch.Tensor | None], num_heads: int | None, norm: str
) -> None:
    """ValueError for heads that do not add up, half a table, or parameters of a norm that has none."""
    N, head_dim = sizes["N"], sizes["head_dim"]
    if not isinstance(num_heads, (int, torch.SymInt)) or not 0 < num_heads < N or (N - num_heads) % 2:
        raise ValueError(
            f"{_OP.name}: num_heads is {num_heads!r} and qkv has {N} heads, expected num_heads + 2 kv_heads; pass the "
            "number of q's heads"
        )
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"{_OP.name}: qkv has head_dim {head_dim}, expected an even one")
    if norm not in NORMS:
        raise ValueError(f"{_OP.name}: norm is {norm!r}, expected one of {', '.join(map(repr, NORMS))}")
    unused = {"none": tuple(DIMS)[1:5], "rms": ("q_bias", "k_bias"), "layer": ()}[norm]
    if given := [name for name in unused if tensors[name] is not None]:
        raise ValueError(f"{_OP.name}: {given[0]} is given, but norm {norm!r} has none, expected None")
    cos, sin = tensors["cos"], tensors["sin"]
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP.name}: one of cos and sin is None, expected both or neither")
    if cos is not None and sizes["half"] != head_dim // 2:
        raise ValueError(f"{_OP.name}: cos has shape {tuple(cos.shape)}, expected (T, {head_dim // 2})")
    if any(table is not None and table.requires_grad for table in (cos, sin)):
        raise ValueError(f"{_OP.name}: cos or sin requires a gradient, expected constants; detach them")


def _sizes(B: int, T: int, N: int, head_dim: int) -> dict[str, int]:
    return {"B": B, "T": T, "N": N, "head_dim": head_dim, "half": head_dim // 2}


_PARAMETERS, _BIASES = ("q_weight", "k_weight", "q_bias", "k_bias"), ("q_bias", "k_bias")
_LAYER, _RMS, _HALVES = {"norm": "layer"}, {"norm": "rms"}, {"interleaved": False}

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
    ),
    bench=(
        Case("DiT-XL/2, LightningDiT's", _sizes(256, 256, 48, 72), {"num_heads": 16} | _RMS, absent=_BIASES),
        Case("DiT-XL/2, LayerNorm, halves", _sizes(256, 256, 48, 72), {"num_heads": 16} | _LAYER | _HALVES),
        Case("LargeDiT-3B", _sizes(256, 256, 96, 96), {"num_heads": 32}, absent=_PARAMETERS),
    ),
    traffic=(Case("8 heads, 64 tokens", _sizes(2, 64, 24, 72), {"num_heads": 8} | _RMS, absent=_BIASES),),
    stream=(*_PARAMETERS, "cos", "sin"),
    optional=_PARAMETERS,
    shard=("B",),
    recompute=("out",),
    bwd_unread=_BIASES,
    peers={"liger-kernel": liger_qk_norm_rope, "flash-attn": flash_attn_qk_norm_rope},
)
