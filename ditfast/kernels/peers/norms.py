"""adaln_modulate and gate_residual_adaln_modulate by other people's norms.

Where a library has no modulation, that is PyTorch's, as in a model that takes its norm from the library.
"""

from collections.abc import Callable
from typing import Any

import torch

from ._base import APEX, LIGER, PeerError, importing


def liger_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str) -> Any:
    """LayerNorm or RMSNorm over the last dim by Liger's kernels, in x's dtype."""
    with importing(LIGER, x.device):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    if norm == "rms":
        # "gemma" is the form with all arithmetic in fp32; by default the backward would overwrite dy.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    return LigerLayerNormFunction.apply(x, weight, x.new_zeros(x.shape[-1]) if bias is None else bias, eps)


def liger_modulated_norm(**inputs: Any) -> torch.Tensor:
    """adaln_modulate by Liger's modulated RMSNorm, or by its norm where it has no modulated one."""
    with importing(LIGER, inputs["x"].device):
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
    x, scale = inputs["x"], inputs["scale"]
    if inputs.get("norm") != "rms" or scale is None or inputs.get("out_dtype") not in (None, x.dtype):
        return _modulated(liger_norm, inputs)
    arguments = (x, inputs["weight"], scale, inputs["shift"], inputs.get("eps", 1e-6), 0.0, "gemma", False)
    return LigerModulatedRMSNormFunction.apply(*arguments)


def apex_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str) -> Any:
    """LayerNorm or RMSNorm over the last dim by NVIDIA apex's kernels."""
    with importing(APEX, x.device):
        import fused_layer_norm_cuda  # noqa: F401  # else found missing by the first launch
        from apex.normalization import fused_layer_norm as apex
    shape = x.shape[-1:]
    if weight is not None and weight.dtype != x.dtype:
        raise PeerError(f"apex takes a weight of x's dtype {x.dtype}, this one is {weight.dtype}")
    if norm == "rms":
        return (
            apex.fused_rms_norm(x, shape, eps) if weight is None else apex.fused_rms_norm_affine(x, weight, shape, eps)
        )
    if weight is None:
        return apex.fused_layer_norm(x, shape, eps)
    return apex.fused_layer_norm_affine(x, weight, x.new_zeros(shape) if bias is None else bias, shape, eps)


def apex_modulated_norm(**inputs: Any) -> torch.Tensor:
    """adaln_modulate by apex's norm and PyTorch's modulation."""
    return _modulated(apex_norm, inputs)


def _modulated(norm: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    x, shift, scale = inputs["x"], inputs["shift"], inputs["scale"]
    y = norm(x, inputs["weight"], None, inputs.get("eps", 1e-6), inputs.get("norm", "layer"))
    if scale is not None:
        y = y * (1 + scale.unsqueeze(1))
    if shift is not None:
        y = y + shift.unsqueeze(1)
    return y.to(inputs.get("out_dtype") or x.dtype)


def after_residual(peer: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """gate_residual_adaln_modulate by a peer of adaln_modulate, the gated residual being PyTorch's."""

    def run(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        branch, gate = inputs.pop("branch"), inputs.pop("gate")
        x = inputs.pop("x")
        x = x + (branch if gate is None else gate.unsqueeze(1) * branch)
        return x, peer(x=x, **inputs)

    return run
