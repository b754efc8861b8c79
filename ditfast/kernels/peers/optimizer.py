"""adamw_ema by other people's AdamW, then EMAs and copies by foreach."""

from collections.abc import Mapping
from typing import Any

import torch

from ._base import APEX, TRANSFORMER_ENGINE, importing


def torch_adamw(**inputs: Any) -> None:
    """adamw_ema by torch's fused AdamW, then EMAs and copies by foreach."""
    from ..adamw_ema import adamw_ema

    adamw_ema(**{**inputs, "emas": [], "alphas": inputs["alphas"][:0], "copies": [], "backend": "torch"})
    _emas_and_copies(inputs)


def apex_adamw(**inputs: Any) -> None:
    """adamw_ema by the kernel of NVIDIA apex's FusedAdam, then EMAs and copies by foreach."""
    with importing(APEX, inputs["weights"][0].device):
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
    _multi_tensor_adamw(amp_C.multi_tensor_adam, multi_tensor_applier, inputs)


def transformer_engine_adamw(**inputs: Any) -> None:
    """adamw_ema by the kernel of Transformer Engine's FusedAdam, then EMAs and copies by foreach."""
    with importing(TRANSFORMER_ENGINE, inputs["weights"][0].device):
        from transformer_engine.pytorch.optimizers import multi_tensor_applier
        from transformer_engine_torch import multi_tensor_adam
    _multi_tensor_adamw(multi_tensor_adam, multi_tensor_applier, inputs)


def _multi_tensor_adamw(kernel: Any, applier: Any, inputs: Mapping[str, Any]) -> None:
    """AdamW by apex's kernel, or its descendant, which have one dtype, one step and one decay a launch.

    So gradients are cast and tensors grouped.
    """
    if bool(inputs["found_inf"]):
        return
    weights, moments = inputs["weights"], (inputs["exp_avgs"], inputs["exp_avg_sqs"])
    grads = [g.to(w.dtype) for g, w in zip(inputs["grads"], weights, strict=True)]
    if inputs["grad_factor"] is not None:
        grads = list(torch._foreach_mul(grads, inputs["grad_factor"].reshape(())))
    inputs["steps"].add_(1)
    groups: dict[tuple[int, float], list[int]] = {}
    for i, (step, decay) in enumerate(zip(inputs["steps"].tolist(), inputs["decays"], strict=True)):
        groups.setdefault((int(step), decay), []).append(i)
    unused = torch.zeros(1, dtype=torch.int, device=weights[0].device)
    betas = (inputs.get("beta1", 0.9), inputs.get("beta2", 0.999), inputs.get("eps", 1e-8))
    for (step, decay), group in groups.items():
        lists = [[tensors[i] for i in group] for tensors in (grads, weights, *moments)]
        # The flags: decay decoupled as in AdamW, moments corrected for their start at zero.
        applier(kernel, unused, lists, float(inputs["lr"]), *betas, step, 1, 1, decay)
    _emas_and_copies(inputs)


def _emas_and_copies(inputs: Mapping[str, Any]) -> None:
    """The EMAs and copies of the stepped weights, unless the step was skipped: as a GradScaler does, on the host."""
    if bool(inputs["found_inf"]):
        return
    for ema, alpha in zip(inputs["emas"], inputs["alphas"].tolist(), strict=True):
        torch._foreach_lerp_(ema, inputs["weights"], alpha)
    if inputs["copies"]:
        torch._foreach_copy_(inputs["copies"], inputs["weights"])
