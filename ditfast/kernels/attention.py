"""o = softmax(scale * q k^T) v over the tokens of one sample, never causal.

q           (B, Tq, H, head_dim); o has its shape and dtype
k, v        (B, Tk, H, head_dim)
qkv         (B, T, 3, H, head_dim), the packed form that the qkv linear of a DiT yields
All strides are free. Eager SDPA on a GPU copies views that are not 16-byte aligned, which its memory-efficient kernel
may read wrongly (pytorch #183484); under torch.compile the layout is the compiler's.
"""

import torch
import torch.nn.functional as F

from ._checks import check_dims, check_floating
from ._op import Op
from .spec import Case, OpSpec

DIMS = {"q": "B Tq H head_dim", "k": "B Tk H head_dim", "v": "B Tk H head_dim"}
PACKED_DIMS = {"qkv": "B T 3 H head_dim"}


def attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The equation in plain PyTorch; it holds the (B, H, Tq, Tk) weights in memory."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def attention_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, its own choice of kernel."""
    if q.is_cuda and not torch.compiler.is_compiling():
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
    ).transpose(1, 2)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where every row starts at 16 bytes, else a copy that does as far as head_dim allows."""
    # Not data_ptr(), which fake tensors and torch.func do not have; the allocator aligns the storage itself.
    if tensor.storage_offset() * tensor.element_size() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    odd = tensor.stride(-1) != 1 or any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
    return tensor.contiguous() if odd else tensor


def attention_qkvpacked_ref(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """`attention_ref` of the three slices."""
    q, k, v = qkv.unbind(2)
    return attention_ref(q, k, v, scale)


def attention_qkvpacked_sdpa(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """`attention_sdpa` of the three slices."""
    q, k, v = qkv.unbind(2)
    return attention_sdpa(q, k, v, scale)


_OP = Op("attention", attention_ref, {"sdpa": attention_sdpa})
_PACKED_OP = Op("attention_qkvpacked", attention_qkvpacked_ref, {"sdpa": attention_qkvpacked_sdpa})


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """o (B, Tq, H, head_dim) of q like it and k, v (B, Tk, H, head_dim); scale is head_dim^-0.5 by default.

    ValueError for shapes that disagree or dtypes that are not floating.
    """
    tensors = {"q": q, "k": k, "v": v}
    sizes = check_dims(_OP.name, DIMS, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (q, k, v), (sizes["head_dim"] ** -0.5 if scale is None else scale,))


def attention_qkvpacked(qkv: torch.Tensor, *, scale: float | None = None, backend: str = "auto") -> torch.Tensor:
    """o (B, T, H, head_dim) of qkv (B, T, 3, H, head_dim); scale is head_dim^-0.5 by default.

    ValueError for another rank, a third dim that is not 3, or a dtype that is not floating.
    """
    tensors = {"qkv": qkv}
    sizes = check_dims(_PACKED_OP.name, PACKED_DIMS, tensors)
    check_floating(_PACKED_OP.name, tensors)
    return _PACKED_OP(backend, (qkv,), (sizes["head_dim"] ** -0.5 if scale is None else scale,))


_XL_HEADS = {"B": 256, "H": 16, "head_dim": 72}

SPEC = OpSpec(
    op=_OP,
    fn=attention,
    dims=DIMS,
    cases=(
        Case("odd", {"B": 3, "Tq": 33, "Tk": 33, "H": 2, "head_dim": 24}),
        Case("cross", {"B": 2, "Tq": 17, "Tk": 2, "H": 2, "head_dim": 16}, {"scale": 0.5}),
        Case("strided", {"B": 2, "Tq": 9, "Tk": 9, "H": 3, "head_dim": 72}, strided=True),
        Case("empty", {"B": 0, "Tq": 9, "Tk": 9, "H": 3, "head_dim": 16}),
    ),
    bench=(Case("DiT-XL/2", _XL_HEADS | {"Tq": 256, "Tk": 256}),),
    flops=lambda inputs: 4 * inputs["q"].numel() * inputs["k"].shape[1],
    shard=("B", "H"),
)
PACKED_SPEC = OpSpec(
    op=_PACKED_OP,
    fn=attention_qkvpacked,
    dims=PACKED_DIMS,
    cases=(
        Case("odd", {"B": 3, "T": 33, "H": 2, "head_dim": 24}),
        Case("strided", {"B": 2, "T": 9, "H": 3, "head_dim": 72}, {"scale": 0.5}, strided=True),
        Case("empty", {"B": 0, "T": 9, "H": 3, "head_dim": 16}),
    ),
    bench=(Case("DiT-XL/2", _XL_HEADS | {"T": 256}),),
    flops=lambda inputs: 4 * inputs["qkv"].numel() // 3 * inputs["qkv"].shape[1],
    shard=("B", "H"),
)
