"""gelu_mlp and swiglu_mlp by other people's fused MLPs and activations."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ._base import APEX, DIFFUSERS, FLASH_ATTN, LIGER, XFORMERS, PeerError, importing, require_one_dtype

_16_BITS = (torch.bfloat16, torch.float16)


def _refuse_recompute(library: str, inputs: dict[str, Any]) -> None:
    if inputs.get("recompute"):
        raise PeerError(f"{library} does not recompute: it has recompute=False alone")


def apex_gelu_mlp(**inputs: Any) -> torch.Tensor:
    """gelu_mlp by apex's fused_dense: bias and GELU in cuBLASLt's epilogues."""
    with importing(APEX, inputs["h"].device):
        import fused_dense_cuda  # noqa: F401  # else found missing by the first launch
        from apex.fused_dense import fused_dense_gelu_dense_function
    _refuse_recompute("apex", inputs)
    require_one_dtype("apex's fused_dense", inputs, *_16_BITS)
    h = inputs["h"]
    names = ("w1", "b1", "w2", "b2")
    y = fused_dense_gelu_dense_function(h.flatten(0, -2).contiguous(), *(inputs[name] for name in names))
    return y.view(*h.shape[:-1], y.shape[-1])


def flash_attn_gelu_mlp(**inputs: Any) -> torch.Tensor:
    """gelu_mlp by flash-attn's fused_dense, with the heuristic that it takes on this GPU."""
    with importing(FLASH_ATTN, inputs["h"].device):
        from flash_attn.ops.fused_dense import fused_mlp_func
    require_one_dtype("flash-attn's fused_dense, which is plain PyTorch for others,", inputs, *_16_BITS)
    on_hopper = inputs["h"].is_cuda and torch.cuda.get_device_capability(inputs["h"].device) == (9, 0)
    return fused_mlp_func(
        *(inputs[name] for name in ("h", "w1", "w2", "b1", "b2")),
        activation="gelu_approx",
        checkpoint_lvl=2 if inputs.get("recompute") else 0,
        heuristic=-1 if on_hopper else 0,
    )


def diffusers_gelu_mlp(**inputs: Any) -> torch.Tensor:
    """gelu_mlp by diffusers' FeedForward, as its DiT has it."""
    _refuse_recompute("diffusers", inputs)
    with importing(DIFFUSERS, inputs["h"].device):
        import diffusers  # noqa: F401
    require_one_dtype("diffusers", inputs)
    names = {"net.0.proj.weight": "w1", "net.0.proj.bias": "b1", "net.2.weight": "w2", "net.2.bias": "b2"}
    parameters = {name: inputs[ours] for name, ours in names.items()}
    return torch.func.functional_call(_feed_forward(*inputs["w2"].shape), parameters, (inputs["h"],))


@lru_cache
def _feed_forward(width: int, inner: int) -> torch.nn.Module:
    """diffusers' module, without weights."""
    from diffusers.models.attention import FeedForward

    with torch.device("meta"):
        return FeedForward(width, activation_fn="gelu-approximate", inner_dim=inner)


def liger_swiglu_mlp(**inputs: Any) -> torch.Tensor:
    """swiglu_mlp by Liger's SiLU and product between PyTorch's linears, as its MLPs have it."""
    with importing(LIGER, inputs["h"].device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    _refuse_recompute("Liger", inputs)
    require_one_dtype("Liger", inputs)
    gate = F.linear(inputs["h"], inputs["w1"], inputs["b1"])
    up = F.linear(inputs["h"], inputs["w3"], inputs["b3"])
    return F.linear(LigerSiLUMulFunction.apply(gate, up), inputs["w2"], inputs["b2"])


def xformers_swiglu_mlp(**inputs: Any) -> torch.Tensor:
    """swiglu_mlp by xformers' swiglu, its own choice of kernel."""
    with importing(XFORMERS, inputs["h"].device):
        from xformers.ops import swiglu
    _refuse_recompute("xformers", inputs)
    require_one_dtype("xformers' swiglu, which is plain PyTorch for others,", inputs, *_16_BITS)
    # Their third weight is our second.
    return swiglu(*(inputs[name] for name in ("h", "w1", "b1", "w3", "b3", "w2", "b2")))
