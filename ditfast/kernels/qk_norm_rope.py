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

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating
from ._op import Kernels, Op
from ._rows import empty_partials, rows_per_program, sum_partials
from ._triton import jit, launch, rows, tl
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
def _load_pairs(row_ptr, live, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of each row, as two tiles in fp32."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)
        x = tl.load(row_ptr[:, None] + col[None, :], mask=live[:, None] & (col < 2 * HALF)[None, :], other=0.0)
        return tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)
        there = live[:, None] & (pair < HALF)[None, :]
        a = tl.load(row_ptr[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(row_ptr[:, None] + HALF + pair[None, :], mask=there, other=0.0).to(tl.float32)
        return a, b


@jit
def _store_pairs(row_ptr, a, b, live, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIRS))
        tl.store(row_ptr[:, None] + col[None, :], both, mask=live[:, None] & (col < 2 * HALF)[None, :])
    else:
        pair = tl.arange(0, PAIRS)
        there = live[:, None] & (pair < HALF)[None, :]
        tl.store(row_ptr[:, None] + pair[None, :], a, mask=there)
        tl.store(row_ptr[:, None] + HALF + pair[None, :], b, mask=there)


@jit
def _load_parameter(ptr, default: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of a (head_dim) vector as rows of one, `default` everywhere where it is None."""
    if ptr is None:
        return tl.full([1, PAIRS], default, tl.float32), tl.full([1, PAIRS], default, tl.float32)
    else:
        one = tl.arange(0, 1)
        return _load_pairs(ptr + one, one == 0, HALF, PAIRS, INTERLEAVED)


@jit
def _norm(a, b, eps, HALF: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr):
    """The normed pairs and rstd of each row."""
    if NORM == "layer":
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / (2 * HALF))[:, None]
        there = (tl.arange(0, PAIRS) < HALF)[None, :]
        a, b = tl.where(there, a - mean, 0.0), tl.where(there, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    return a * rstd, b * rstd, rstd


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
    section = pid % 3
    sample = (pid // 3 // chunks).to(tl.int64)
    first = (pid // 3 % chunks) * ROWS
    first_head = tl.where(section == 0, 0, HEADS + (section - 1) * KV_HEADS)
    heads = tl.where(section == 0, HEADS, KV_HEADS)
    weight_a, weight_b = _load_parameter(q_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    bias_a, bias_b = _load_parameter(q_bias_ptr, 0.0, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = _load_parameter(k_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
        bias_a, bias_b = _load_parameter(k_bias_ptr, 0.0, HALF, PAIRS, INTERLEAVED)
    pair = tl.arange(0, PAIRS)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            # v is not rotated, and its angles are not read.
            turned = (token < tl.where(section < 2, T, 0))[:, None] & (pair < HALF)[None, :]
            cos = tl.load(cos_ptr + token64[:, None] * stride_cos + pair[None, :], mask=turned, other=0.0)
            sin = tl.load(sin_ptr + token64[:, None] * stride_sin + pair[None, :], mask=turned, other=0.0)
            cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        for h in range(0, heads):
            head = first_head + h
            x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
            out_row = out_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            a, b = _load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if NORM != "none":
                    a, b, _ = _norm(a, b, eps, HALF, PAIRS, NORM)
                    a, b = a * weight_a + bias_a, b * weight_b + bias_b
                if cos_ptr is not None:
                    a, b = a * cos - b * sin, a * sin + b * cos
            _store_pairs(out_row, a, b, live, HALF, PAIRS, INTERLEAVED)


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
    section = pid % 3
    chunk = (pid // 3).to(tl.int64)
    sample = chunk // chunks
    first = (pid // 3 % chunks) * ROWS
    first_head = tl.where(section == 0, 0, HEADS + (section - 1) * KV_HEADS)
    heads = tl.where(section == 0, HEADS, KV_HEADS)
    weight_a, weight_b = _load_parameter(q_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    if section == 1:
        weight_a, weight_b = _load_parameter(k_weight_ptr, 1.0, HALF, PAIRS, INTERLEAVED)
    dweight_a = tl.zeros([1, PAIRS], tl.float32)
    dweight_b = tl.zeros([1, PAIRS], tl.float32)
    dbias_a = tl.zeros([1, PAIRS], tl.float32)
    dbias_b = tl.zeros([1, PAIRS], tl.float32)
    pair = tl.arange(0, PAIRS)

    for t in range(first, tl.minimum(first + ROWS, T), BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token64 = token.to(tl.int64)
        live = token < T
        if cos_ptr is not None:
            turned = (token < tl.where(section < 2, T, 0))[:, None] & (pair < HALF)[None, :]
            cos = tl.load(cos_ptr + token64[:, None] * stride_cos + pair[None, :], mask=turned, other=0.0)
            sin = tl.load(sin_ptr + token64[:, None] * stride_sin + pair[None, :], mask=turned, other=0.0)
            cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        for h in range(0, heads):
            head = first_head + h
            dout_row = dout_ptr + sample * stride_dout_b + token64 * stride_dout_t + head * stride_dout_h
            dx_row = dx_ptr + ((sample * T + token64) * N + head) * (2 * HALF)
            da, db = _load_pairs(dout_row, live, HALF, PAIRS, INTERLEAVED)
            if section < 2:
                if cos_ptr is not None:
                    da, db = da * cos + db * sin, db * cos - da * sin
                if NORM != "none":
                    x_row = x_ptr + sample * stride_xb + token64 * stride_xt + head * stride_xh
                    a, b = _load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)
                    a, b, rstd = _norm(a, b, eps, HALF, PAIRS, NORM)
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
            _store_pairs(dx_row, da, db, live, HALF, PAIRS, INTERLEAVED)

    if partial_ptr is not None:
        # (2, chunks of all samples, 2, head_dim): q's rows before k's, none of v's.
        row = section * (tl.num_programs(0) // 3) + chunk
        one = tl.arange(0, 1)
        at = partial_ptr + row * (4 * HALF) + one
        _store_pairs(at, dweight_a, dweight_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)
        _store_pairs(at + 2 * HALF, dbias_a, dbias_b, one < 2 - section, HALF, PAIRS, INTERLEAVED)


def _tiling(qkv: torch.Tensor, num_heads: int, norm: str, interleaved: bool) -> tuple[int, dict[str, object]]:
    """(chunks of tokens per sample, constants of the launch)."""
    B, T, N, head_dim = qkv.shape
    if head_dim > 256:
        raise ValueError(f"{_OP.name}: head_dim is {head_dim}, the kernels take up to 256; use backend='reference'")
    per_program = rows_per_program(BLOCK_T, ROWS, 3 * B, T)
    half = head_dim // 2
    return -(-T // per_program), {
        **{"HEADS": num_heads, "KV_HEADS": (N - num_heads) // 2, "HALF": half, "PAIRS": 1 << (half - 1).bit_length()},
        **{"NORM": norm, "INTERLEAVED": interleaved, "BLOCK_T": BLOCK_T, "ROWS": per_program, "num_warps": WARPS},
    }


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else rows(vector)


def _qk_norm_rope_empty(qkv: torch.Tensor, *rest: object) -> tuple[torch.Tensor]:
    """out, not yet written."""
    return (torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),)


def _qk_norm_rope_fwd(
    results: tuple[torch.Tensor, ...],
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
) -> None:
    (out,) = results
    B, T = qkv.shape[:2]
    chunks, meta = _tiling(qkv, num_heads, norm, interleaved)
    qkv, parameters = rows(qkv), [_dense(p) for p in (q_weight, k_weight, q_bias, k_bias)]
    tables = [_dense(table) for table in (cos, sin)]
    strides = (*qkv.stride()[:3], *(0 if table is None else table.stride(0) for table in tables))
    args = (qkv, *parameters, *tables, out, T, chunks, eps, *strides)
    launch(_qk_norm_rope_fwd_kernel, 3 * B * chunks, *args, **meta)


def _qk_norm_rope_bwd(
    grads: tuple[torch.Tensor, ...],
    dout: torch.Tensor,
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
) -> None:
    dqkv, *dparameters = grads
    B, T, _, head_dim = qkv.shape
    chunks, meta = _tiling(qkv, num_heads, norm, interleaved)
    dout, qkv = rows(dout), rows(qkv)
    weights, tables = [_dense(w) for w in (q_weight, k_weight)], [_dense(table) for table in (cos, sin)]
    parameters = (q_weight, k_weight, q_bias, k_bias)
    graded = any(parameter is not None for parameter in parameters)
    partial = empty_partials(2 * B, chunks, 2, head_dim, qkv.device) if graded else None
    table_strides = (0 if table is None else table.stride(0) for table in tables)
    strides = (*dout.stride()[:3], *qkv.stride()[:3], *table_strides)
    args = (dout, qkv, *weights, *tables, dqkv, partial, T, chunks, eps, *strides)
    launch(_qk_norm_rope_bwd_kernel, 3 * B * chunks, *args, **meta)
    if partial is not None:
        unwanted = partial.new_empty((1, head_dim))
        wanted = [unwanted if p is None else dp.view(1, -1) for p, dp in zip(parameters, dparameters, strict=False)]
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
    sizes = check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    _check_arguments(sizes, tensors, num_heads, norm)
    out = _OP(backend, tuple(tensors.values()), (num_heads, norm, eps, interleaved))
    return out.view_as(packed) if packed.ndim == 5 else out


def _check_arguments(
    sizes: dict[str, int], tensors: dict[str, torch.Tensor | None], num_heads: int | None, norm: str
) -> None:
    """ValueError for heads that do not add up, half a table, or parameters of a norm that has none."""
    N, head_dim = sizes["N"], sizes["head_dim"]
    if num_heads is None or not 0 < num_heads < N or (N - num_heads) % 2:
        raise ValueError(
            f"{_OP.name}: num_heads is {num_heads} and qkv has {N} heads, expected num_heads + 2 kv_heads; pass the "
            "number of q's heads"
        )
    if head_dim % 2:
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


_PARAMETERS = ("q_weight", "k_weight", "q_bias", "k_bias")
_BIASES = ("q_bias", "k_bias")
_XL = {"B": 256, "T": 256, "N": 48, "head_dim": 72, "half": 36}

SPEC = OpSpec(
    op=_OP,
    fn=qk_norm_rope,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 2, "T": 19, "N": 4, "head_dim": 24, "half": 12}, {"num_heads": 2, "norm": "layer"}),
        Case(
            "mixed",
            {"B": 2, "T": 18, "N": 4, "head_dim": 72, "half": 36},
            {"num_heads": 2, "norm": "rms"},
            mixed=True,
            absent=_BIASES,
        ),
        Case(
            "rope_only",
            {"B": 2, "T": 9, "N": 4, "head_dim": 32, "half": 16},
            {"num_heads": 2, "interleaved": False},
            absent=_PARAMETERS,
        ),
        Case(
            "norm_only",
            {"B": 2, "T": 7, "N": 5, "head_dim": 10, "half": 5},
            {"num_heads": 3, "norm": "layer"},
            absent=("cos", "sin", "q_bias", "k_weight"),
        ),
        Case(
            "strided",
            {"B": 2, "T": 17, "N": 4, "head_dim": 48, "half": 24},
            {"num_heads": 2, "norm": "rms", "interleaved": False, "eps": 1e-2},
            strided=True,
            absent=_BIASES,
        ),
        Case("empty", {"B": 0, "T": 5, "N": 3, "head_dim": 16, "half": 8}, {"num_heads": 1, "norm": "layer"}),
        Case(
            "long", {"B": 2, "T": 67, "N": 3, "head_dim": 72, "half": 36}, {"num_heads": 1, "norm": "layer"}, full=True
        ),
    ),
    bench=(
        Case("DiT-XL/2, LightningDiT's", _XL, {"num_heads": 16, "norm": "rms"}, absent=_BIASES),
        Case("DiT-XL/2, LayerNorm, half pairs", _XL, {"num_heads": 16, "norm": "layer", "interleaved": False}),
        Case(
            "LargeDiT-3B",
            {"B": 256, "T": 256, "N": 96, "head_dim": 96, "half": 48},
            {"num_heads": 32},
            absent=_PARAMETERS,
        ),
    ),
    traffic=(
        Case("8 heads, 64 tokens", _XL | {"B": 2, "T": 64, "N": 24}, {"num_heads": 8, "norm": "rms"}, absent=_BIASES),
    ),
    stream=(*_PARAMETERS, "cos", "sin"),
    optional=_PARAMETERS,
    constants=("cos", "sin"),
    shard=("B",),
    recompute=("out",),
    bwd_unread=_BIASES,
)
