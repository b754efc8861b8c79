"""What the benches compare an op with: plain PyTorch, torch.compile of it, and libraries, imported when first called.

A peer takes the keyword arguments of the op's function, but for `backend`, and gives its results or writes in place.
PeerError says which library is missing, or what of these arguments it cannot do.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from .spec import OpSpec

Peer = Callable[..., Any]


class PeerError(RuntimeError):
    """A peer that cannot run here, or not on these arguments; the message says why."""


def peers_of(spec: OpSpec) -> dict[str, Peer]:
    """Every peer of an op by name: "eager", "compile" unless it works in place, and the spec's own."""
    eager = partial(spec.fn, backend="reference")
    # Of an op in place over hundreds of tensors torch.compile makes one graph for minutes, which nobody would run.
    return {"eager": eager} | ({} if spec.mutates else {"compile": _compiled(eager)}) | dict(spec.peers or {})


def _compiled(fn: Peer) -> Peer:
    """torch.compile of fn, made at the first call: making it imports the compiler."""

    @cache
    def made() -> Peer:
        return torch.compile(fn, fullgraph=True, dynamic=False)

    return lambda **inputs: made()(**inputs)


def liger_modulated_norm(**inputs: Any) -> torch.Tensor:
    """adaln_modulate by Liger's kernel, which has the RMSNorm of it."""
    try:
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
    except ImportError as error:
        raise PeerError(f"Liger's modulated RMSNorm is missing ({error}); pip install 'liger-kernel>=0.8'") from error
    x, scale = inputs["x"], inputs["scale"]
    if inputs.get("norm") != "rms" or scale is None or inputs.get("out_dtype") not in (None, x.dtype):
        raise PeerError("Liger has the modulated norm for norm='rms', with a scale, in x's dtype alone")
    # "gemma" is the form with all arithmetic in fp32; by default the backward would overwrite dy.
    arguments = (x, inputs["weight"], scale, inputs["shift"], inputs.get("eps", 1e-6), 0.0, "gemma", False)
    return LigerModulatedRMSNormFunction.apply(*arguments)


def torch_adamw(**inputs: Any) -> None:
    """adamw_ema by torch's fused AdamW, then EMAs and copies by foreach."""
    from .adamw_ema import adamw_ema

    adamw_ema(**{**inputs, "emas": [], "alphas": inputs["alphas"][:0], "copies": [], "backend": "torch"})
    _emas_and_copies(inputs)


def apex_adamw(**inputs: Any) -> None:
    """adamw_ema by the kernel of NVIDIA apex's FusedAdam, then EMAs and copies by foreach.

    Its tensors have one dtype, one step and one decay a launch, so gradients are cast and tensors grouped.
    """
    kernel, applier = _apex()
    if bool(inputs["found_inf"]):
        return
    weights, moments = inputs["weights"], (inputs["exp_avgs"], inputs["exp_avg_sqs"])
    grads = [g.to(w.dtype) for g, w in zip(inputs["grads"], weights, strict=True)]
    if inputs["grad_factor"] is not None:
        grads = list(torch._foreach_mul(grads, inputs["grad_factor"].reshape(())))
    inputs["steps"] += 1
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


def _apex() -> tuple[Any, Any]:
    """(kernel, what launches it) of NVIDIA's apex; PeerError without it."""
    try:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError as error:
        raise PeerError(
            f"NVIDIA apex with its extensions is missing ({error}); build it from github.com/NVIDIA/apex "
            "(`apex` on PyPI is another package)"
        ) from error
    return amp_C.multi_tensor_adam, multi_tensor_applier


def _emas_and_copies(inputs: Mapping[str, Any]) -> None:
    """The EMAs and copies of the stepped weights, unless the step was skipped: as a GradScaler does, on the host."""
    if bool(inputs["found_inf"]):
        return
    for ema, alpha in zip(inputs["emas"], inputs["alphas"].tolist(), strict=True):
        torch._foreach_lerp_(ema, inputs["weights"], alpha)
    if inputs["copies"]:
        torch._foreach_copy_(inputs["copies"], inputs["weights"])


def as_backend(spec: OpSpec, peer: Peer) -> OpSpec:
    """The spec with a peer in place of the op's function, for parity.py to judge; its `backend` is ignored."""
    return replace(spec, fn=lambda *, backend, **inputs: peer(**inputs))
