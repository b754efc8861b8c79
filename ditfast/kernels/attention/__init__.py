"""o = softmax(scale * q k^T) v over the tokens of one sample, never causal; grouped heads too (arXiv:2305.13245).

q           (B, Tq, H, head_dim); o has its shape and the dtype computed in
k, v        (B, Tk, H_kv, head_dim), Tk > 0, H a multiple of H_kv: head h of q reads head h // (H / H_kv) of k and v,
            which Triton's kernels take as they are, and sum dk and dv over the heads of a group in one program
qkv         (B, T, 3, H, head_dim), the packed form that the qkv linear of a DiT yields, or with fewer heads of k and v
            (B, T, H + 2 H_kv, head_dim), heads of q | k | v; its gradient is written packed
strides     free; the Triton kernels copy a tensor whose last dim is not dense
dtypes      one for all three; autocast casts them to its own, as it does for PyTorch's attention. The Triton kernels
            take float32 (IEEE products, or TF32 where PyTorch's setting asks for it), bfloat16 and float16, and a
            head_dim in multiples of 8 from 32 to 128
fp32        scores, softmax, all sums; the weights round once to the dtype of v, as in every fused attention
saved       q, k, v, o, and lse (B, H, Tq) in fp32: the logarithm of each row's sum of exponentials, to base 2, since
            the kernels exponentiate to that base and a change of base rounds

A head_dim that is no power of two is two products: 72 = 64 + 16, the tail masked, where padding to 128 would waste 44 %
of the work. forward.py and backward.py hold the kernels, short.py the backward of up to 256 tokens; libraries.py the
kernels of others, dispatch.py the choice.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .._checks import check_dims, check_even_heads, check_floating, check_not_empty, check_number, is_whole
from .._gemm import linear_dtype
from .._op import Kernels, Op
from ..peers import transformer_engine_attention, transformer_engine_qkvpacked
from ..spec import Case, OpSpec
from . import backward, dispatch, forward, libraries, short
from .reference import attention_qkvpacked_ref, attention_ref, unpacked

DIMS = {"q": "B Tq H head_dim", "k": "B Tk H_kv head_dim", "v": "B Tk H_kv head_dim"}
EVEN_DIMS = {"qkv": "B T 3 H head_dim"}
PACKED_DIMS = {"qkv": "B T N head_dim"}


def _empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return forward.empty(q)


def _bwd(grads: tuple[torch.Tensor, ...], do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    (short if short.takes(q, k) else backward).backward(grads, do, q, k, *rest)


def _packed_empty(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return forward.empty(unpacked(qkv, num_heads)[0])


def _packed_fwd(results: tuple[torch.Tensor, ...], qkv: torch.Tensor, num_heads: int, scale: float) -> None:
    q, k, v = unpacked(qkv, num_heads)
    forward.forward(results, q, k, v, scale)


def _packed_bwd(
    grads: tuple[torch.Tensor, ...],
    do: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
) -> None:
    _bwd(unpacked(grads[0], num_heads), do, *unpacked(qkv, num_heads), o, lse, scale)


_OP = Op(
    "attention",
    attention_ref,
    libraries.FUNCTIONS,
    Kernels(
        inputs="Tensor q, Tensor k, Tensor v",
        attrs="float scale",
        outputs=("o",),
        saved=("lse",),
        empty=_empty,
        fwd=forward.forward,
        bwd=_bwd,
        reads=("o",),
    ),
    auto=dispatch.auto,
    refusal=dispatch.refusal,
)
_PACKED_OP = Op(
    "attention_qkvpacked",
    attention_qkvpacked_ref,
    libraries.PACKED_FUNCTIONS,
    Kernels(
        inputs="Tensor qkv",
        attrs="int num_heads, float scale",
        outputs=("o",),
        saved=("lse",),
        empty=_packed_empty,
        fwd=_packed_fwd,
        bwd=_packed_bwd,
        reads=("o",),
    ),
    auto=dispatch.auto,
    refusal=dispatch.refusal,
)


def _scale(op: str, scale: float | None, head_dim: int) -> float:
    """The scale given, or head_dim^-0.5."""
    if scale is None:
        return head_dim**-0.5
    check_number(op, "scale", scale)
    if not 0 < scale < math.inf:
        raise ValueError(
            f"{op}: scale is {scale}, expected a positive number below infinity; negate q for a negative one"
        )
    return float(scale)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """o (B, Tq, H, head_dim) of q like it and k, v (B, Tk, H_kv, head_dim); scale is head_dim^-0.5 by default.

    ValueError for shapes that disagree, an H that is no multiple of H_kv, dtypes that differ or are not floating, no
    keys, or a scale that is not positive; BackendError where the backend cannot run.
    """
    tensors = {"q": q, "k": k, "v": v}
    sizes = check_dims(_OP.name, DIMS, tensors)
    if not _serve(sizes["H_kv"], sizes["H"]):
        raise ValueError(
            f"{_OP.name}: q has {sizes['H']} heads and k {sizes['H_kv']}, expected a number of q's heads that is a "
            "multiple of that of k's and v's"
        )
    check_not_empty(_OP.name, sizes, "head_dim")
    check_floating(_OP.name, tensors)
    q, k, v = (tensor.to(linear_dtype(tensor)) for tensor in (q, k, v))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{_OP.name}: {name} has dtype {tensor.dtype}, expected q's, {q.dtype}; convert it")
    if sizes["Tk"] == 0 and sizes["Tq"] > 0:
        raise ValueError(f"{_OP.name}: k has shape {tuple(k.shape)}, expected at least one key to attend to")
    return _OP(backend, (q, k, v), (_scale(_OP.name, scale, sizes["head_dim"]),))


def attention_qkvpacked(
    qkv: torch.Tensor, *, num_heads: int | None = None, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """o (B, T, H, head_dim) of qkv (B, T, 3, H, head_dim), or with num_heads=H of qkv (B, T, H + 2 H_kv, head_dim).

    num_heads may be given for the former too; scale is head_dim^-0.5 by default. ValueError for another shape, heads
    that do not add up or divide, a dtype that is not floating, or a scale that is not positive; BackendError where the
    backend cannot run.
    """
    tensors, op = {"qkv": qkv}, _PACKED_OP
    one_dim = isinstance(qkv, torch.Tensor) and qkv.ndim == 4
    sizes = check_dims(op.name, PACKED_DIMS if one_dim else EVEN_DIMS, tensors)
    if not one_dim:
        check_even_heads(op.name, num_heads, sizes["H"])
        num_heads = sizes["H"]
    elif 3 * (num_heads := _check_heads(num_heads, sizes["N"])) == sizes["N"]:
        qkv = qkv.unflatten(2, (3, num_heads))
    check_not_empty(op.name, sizes, "head_dim")
    check_floating(op.name, tensors)
    return op(backend, (qkv.to(linear_dtype(qkv)),), (num_heads, _scale(op.name, scale, sizes["head_dim"])))


def _serve(kv_heads: int, num_heads: int) -> bool:
    """Whether each of these heads of k can serve equally many of q."""
    return kv_heads == num_heads or (0 < kv_heads < num_heads and num_heads % kv_heads == 0)


def _check_heads(num_heads: int | None, N: int) -> int:
    """num_heads; ValueError where N heads of q, k and v cannot be so many of q and twice a divisor of it."""
    if not (
        is_whole(num_heads) and num_heads > 0 and (N - num_heads) % 2 == 0 and _serve((N - num_heads) // 2, num_heads)
    ):
        raise ValueError(
            f"{_PACKED_OP.name}: num_heads is {num_heads!r} and qkv has {N} heads, expected num_heads + 2 kv_heads, "
            "num_heads a multiple of kv_heads; pass the number of q's heads"
        )
    return num_heads


def _slack(inputs: Mapping[str, Any]) -> dict[str, float]:
    """How far the RMS errors of dq and dk may exceed the budgets.

    Delta comes from the rounded o, as in every flash attention: an error that all keys of a row share, and that does
    not average out in dq as those of the eager softmax do. In bfloat16 dq then has 1.0 times their RMS error with 64
    keys, 1.7 with 256, 2.5 with 600 and 3.0 with 1024, by PyTorch's own kernels too. With two keys, whose ds are a
    difference of nearly equal numbers, dk shows it in float32, to 1.3 times that budget, and dq in TF32, to 1.4 times.
    The rest is the spread of the errors between draws of a few numbers.
    """
    k = inputs["k"]
    single = k.dtype == torch.float32
    return {"dq": math.sqrt((2 if single else 1.2) + k.shape[1] / 90), "dk": 1.5 if single else 1.1}


# Every tile of queries reads all keys again, and the backward reads all twice; the L1 or L2 serves that.
_LIMITS = {"requested": 2.05}


def _sizes(B: int, Tq: int, Tk: int, H: int, head_dim: int, H_kv: int | None = None) -> dict[str, int]:
    return {"B": B, "Tq": Tq, "Tk": Tk, "H": H, "H_kv": H_kv or H, "head_dim": head_dim}


def _packed(name: str, B: int, T: int, H: int, head_dim: int, H_kv: int | None = None, **options: Any) -> Case:
    sizes = {"B": B, "T": T, "N": H + 2 * (H_kv or H), "head_dim": head_dim}
    return Case(name, sizes, {"num_heads": H} | options.pop("kwargs", {}), **options)


def _packed_limits(inputs: Mapping[str, Any]) -> dict[str, float]:
    """_LIMITS, or more for grouped heads: each reads k and v, and both kernels of the backward read q and do."""
    even = inputs["qkv"].shape[2] == 3 * inputs["num_heads"]
    return _LIMITS if even else {"requested": 2.65, "unique": 1.53}


SPEC = OpSpec(
    op=_OP,
    fn=attention,
    dims=DIMS,
    cases=(
        Case("odd", _sizes(3, 33, 33, 2, 72)),
        Case("cross", _sizes(2, 17, 2, 2, 32), {"scale": 0.5}),
        Case("strided", _sizes(2, 33, 63, 3, 48), strided=True),
        Case("long", _sizes(2, 300, 65, 1, 80)),
        Case("heads", _sizes(2, 33, 257, 2, 32)),
        Case("peaked", _sizes(2, 5, 200, 1, 64), {"scale": 2.0}),
        Case("grouped", _sizes(2, 33, 130, 4, 72, H_kv=2)),
        Case("one_kv_head", _sizes(2, 19, 5, 3, 32, H_kv=1), {"scale": 0.5}),
        Case("empty", _sizes(0, 9, 9, 3, 32)),
        Case("no_tokens", _sizes(2, 0, 0, 3, 32), full=True),
        Case("one_query", _sizes(3, 1, 9, 2, 32), full=True),
        Case("many_keys", _sizes(2, 65, 600, 2, 72), full=True),
        Case("groups_of_4", _sizes(2, 140, 33, 8, 48, H_kv=2), strided=True, full=True),
        *(Case(f"head_dim_{d}", _sizes(2, 63, 33, 2, d), full=True) for d in (56, 80, 88, 96, 104, 128)),
    ),
    bench=(
        Case("DiT-XL/2", _sizes(256, 256, 256, 16, 72)),
        Case("DiT-XL/2, T = 1024", _sizes(64, 1024, 1024, 16, 72)),
    ),
    flops=lambda inputs: 4 * inputs["q"].numel() * inputs["k"].shape[1],
    shard=("B", "H", "H_kv"),  # both heads alike, by a divisor of H_kv
    traffic=(Case("DiT-XL/2, 2 heads, T = 256", _sizes(2, 256, 256, 2, 72)),),
    limits=_LIMITS,
    slack=_slack,
    peers={"transformer-engine": transformer_engine_attention},
)
PACKED_SPEC = OpSpec(
    op=_PACKED_OP,
    fn=attention_qkvpacked,
    dims=PACKED_DIMS,
    cases=(
        _packed("odd", 3, 33, 2, 72),
        _packed("strided", 2, 63, 3, 40, kwargs={"scale": 0.5}, strided=True),
        _packed("long", 2, 257, 1, 64),
        _packed("grouped", 2, 63, 4, 40, H_kv=1, strided=True),
        _packed("empty", 0, 9, 3, 32),
        *(_packed(f"head_dim_{d}", 2, 130, 2, d, full=True) for d in (32, 72, 80, 96, 128)),
        _packed("groups_of_2", 2, 130, 4, 72, H_kv=2, full=True),
    ),
    bench=(
        _packed("DiT-XL/2", 256, 256, 16, 72),
        _packed("DiT-XL/2, T = 1024", 64, 1024, 16, 72),
        _packed("LargeDiT-3B", 256, 256, 32, 96),
        _packed("LargeDiT-3B, 8 heads of k", 256, 256, 32, 96, H_kv=8),
        _packed("DiT-L/2", 256, 256, 16, 64),
    ),
    flops=lambda inputs: 4 * inputs["qkv"][:, :, : inputs["num_heads"]].numel() * inputs["qkv"].shape[1],
    shard=("B",),
    traffic=(
        _packed("DiT-XL/2, 2 heads, T = 256", 2, 256, 2, 72),
        _packed("LargeDiT-3B, 4 heads, 1 of k", 1, 256, 4, 96, H_kv=1),
    ),
    limits=_packed_limits,
    peers={"transformer-engine": transformer_engine_qkvpacked},
)
