"""o = softmax(scale * q k^T) v over the tokens of one sample, never causal.

q           (B, Tq, H, head_dim); o has its shape and the dtype computed in
k, v        (B, Tk, H, head_dim), Tk > 0
qkv         (B, T, 3, H, head_dim), the packed form that the qkv linear of a DiT yields; its gradient is written packed
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

from .._checks import check_dims, check_floating, check_not_empty, check_number
from .._gemm import linear_dtype
from .._op import Kernels, Op
from ..peers import transformer_engine_attention, transformer_engine_qkvpacked
from ..spec import Case, OpSpec
from . import backward, dispatch, forward, libraries, short
from .reference import attention_qkvpacked_ref, attention_ref

DIMS = {"q": "B Tq H head_dim", "k": "B Tk H head_dim", "v": "B Tk H head_dim"}
PACKED_DIMS = {"qkv": "B T 3 H head_dim"}


def _empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return forward.empty(q)


def _bwd(grads: tuple[torch.Tensor, ...], do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    (short if short.takes(q, k) else backward).backward(grads, do, q, k, *rest)


def _packed_empty(qkv: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return forward.empty(qkv[:, :, 0])


def _packed_fwd(results: tuple[torch.Tensor, ...], qkv: torch.Tensor, scale: float) -> None:
    q, k, v = qkv.unbind(2)
    forward.forward(results, q, k, v, scale)


def _packed_bwd(
    grads: tuple[torch.Tensor, ...],
    do: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    _bwd(grads[0].unbind(2), do, *qkv.unbind(2), o, lse, scale)


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
        attrs="float scale",
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
    """o (B, Tq, H, head_dim) of q like it and k, v (B, Tk, H, head_dim); scale is head_dim^-0.5 by default.

    ValueError for shapes that disagree, dtypes that differ or are not floating, no keys, or a scale that is not
    positive; BackendError where the backend cannot run.
    """
    tensors = {"q": q, "k": k, "v": v}
    sizes = check_dims(_OP.name, DIMS, tensors)
    check_not_empty(_OP.name, sizes, "head_dim")
    check_floating(_OP.name, tensors)
    q, k, v = (tensor.to(linear_dtype(tensor)) for tensor in (q, k, v))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{_OP.name}: {name} has dtype {tensor.dtype}, expected q's, {q.dtype}; convert it")
    if sizes["Tk"] == 0 and sizes["Tq"] > 0:
        raise ValueError(f"{_OP.name}: k has shape {tuple(k.shape)}, expected at least one key to attend to")
    return _OP(backend, (q, k, v), (_scale(_OP.name, scale, sizes["head_dim"]),))


def attention_qkvpacked(qkv: torch.Tensor, *, scale: float | None = None, backend: str = "auto") -> torch.Tensor:
    """o (B, T, H, head_dim) of qkv (B, T, 3, H, head_dim); scale is head_dim^-0.5 by default.

    ValueError for another rank, a third dim that is not 3, a dtype that is not floating, or a scale that is not
    positive; BackendError where the backend cannot run.
    """
    tensors = {"qkv": qkv}
    sizes = check_dims(_PACKED_OP.name, PACKED_DIMS, tensors)
    check_not_empty(_PACKED_OP.name, sizes, "head_dim")
    check_floating(_PACKED_OP.name, tensors)
    return _PACKED_OP(backend, (qkv.to(linear_dtype(qkv)),), (_scale(_PACKED_OP.name, scale, sizes["head_dim"]),))


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

_XL = {"H": 16, "head_dim": 72}

SPEC = OpSpec(
    op=_OP,
    fn=attention,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 3, "Tq": 33, "Tk": 33, "H": 2, "head_dim": 72}),
        Case("cross", {"B": 2, "Tq": 17, "Tk": 2, "H": 2, "head_dim": 32}, {"scale": 0.5}),
        Case("strided", {"B": 2, "Tq": 33, "Tk": 63, "H": 3, "head_dim": 48}, strided=True),
        Case("long", {"B": 2, "Tq": 300, "Tk": 65, "H": 1, "head_dim": 80}),
        Case("heads", {"B": 2, "Tq": 33, "Tk": 257, "H": 2, "head_dim": 32}),
        Case("peaked", {"B": 2, "Tq": 5, "Tk": 200, "H": 1, "head_dim": 64}, {"scale": 2.0}),
        Case("empty", {"B": 0, "Tq": 9, "Tk": 9, "H": 3, "head_dim": 32}),
        Case("no_tokens", {"B": 2, "Tq": 0, "Tk": 0, "H": 3, "head_dim": 32}, full=True),
        Case("one_query", {"B": 3, "Tq": 1, "Tk": 9, "H": 2, "head_dim": 32}, full=True),
        Case("many_keys", {"B": 2, "Tq": 65, "Tk": 600, "H": 2, "head_dim": 72}, full=True),
        *(
            Case(f"head_dim_{d}", {"B": 2, "Tq": 63, "Tk": 33, "H": 2, "head_dim": d}, full=True)
            for d in (56, 80, 88, 96, 104, 128)
        ),
    ),
    bench=(
        Case("DiT-XL/2", _XL | {"B": 256, "Tq": 256, "Tk": 256}),
        Case("DiT-XL/2, T = 1024", _XL | {"B": 64, "Tq": 1024, "Tk": 1024}),
    ),
    flops=lambda inputs: 4 * inputs["q"].numel() * inputs["k"].shape[1],
    shard=("B", "H"),
    traffic=(Case("DiT-XL/2, 2 heads, T = 256", _XL | {"B": 2, "Tq": 256, "Tk": 256, "H": 2}),),
    limits=_LIMITS,
    slack=_slack,
    peers={"transformer-engine": transformer_engine_attention},
)
PACKED_SPEC = OpSpec(
    op=_PACKED_OP,
    fn=attention_qkvpacked,
    dims=PACKED_DIMS,
    cases=(
        Case("odd", {"B": 3, "T": 33, "H": 2, "head_dim": 72}),
        Case("strided", {"B": 2, "T": 63, "H": 3, "head_dim": 40}, {"scale": 0.5}, strided=True),
        Case("long", {"B": 2, "T": 257, "H": 1, "head_dim": 64}),
        Case("empty", {"B": 0, "T": 9, "H": 3, "head_dim": 32}),
        *(Case(f"head_dim_{d}", {"B": 2, "T": 130, "H": 2, "head_dim": d}, full=True) for d in (32, 72, 80, 96, 128)),
    ),
    bench=(
        Case("DiT-XL/2", _XL | {"B": 256, "T": 256}),
        Case("DiT-XL/2, T = 1024", _XL | {"B": 64, "T": 1024}),
        Case("LargeDiT-3B", {"B": 256, "T": 256, "H": 32, "head_dim": 96}),
        Case("DiT-L/2", {"B": 256, "T": 256, "H": 16, "head_dim": 64}),
    ),
    flops=lambda inputs: 4 * inputs["qkv"].numel() // 3 * inputs["qkv"].shape[1],
    shard=("B", "H"),
    traffic=(Case("DiT-XL/2, 2 heads, T = 256", _XL | {"B": 2, "T": 256, "H": 2}),),
    limits=_LIMITS,
    peers={"transformer-engine": transformer_engine_qkvpacked},
)
