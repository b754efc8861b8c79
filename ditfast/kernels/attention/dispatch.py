"""Which backend attention takes, and what keeps one from running."""

from collections.abc import Sequence
from typing import Any

import torch

from . import libraries
from .tiles import has_kernels

# (least compute capability, most bytes of an element, what "auto" takes: the first that can run). From PyTorch's and
# NVIDIA's published figures, at Hopper's training shapes cuDNN is about twice as fast as PyTorch's own choice, FA2;
# nothing here is measured by bench/ yet, which is also why neither our kernels nor packages that must be installed
# are in the table. float64, and a head_dim that the others refuse, end at sdpa.
RULES = (
    (90, 2, ("cudnn", "sdpa")),
    (0, 8, ("sdpa",)),
)


def auto(device: torch.device, dtype: torch.dtype, inputs: Sequence[Any]) -> str:
    """What "auto" takes: by RULES on a GPU, elsewhere PyTorch's own kernels."""
    if device.type != "cuda":
        return "sdpa"
    capability = libraries.capability(device)
    _, _, names = next(rule for rule in RULES if capability >= rule[0] and dtype.itemsize <= rule[1])
    return next(name for name in names if refusal(name, device, dtype, inputs) is None)


def refusal(backend: str, device: torch.device, dtype: torch.dtype, inputs: Sequence[Any]) -> str | None:
    """What keeps a backend from running on such inputs (none: any of this device and dtype); None: nothing here."""
    head_dim = inputs[0].shape[-1] if inputs else None
    if backend in libraries.LIBRARIES:
        return libraries.refusal(backend, device, dtype, head_dim, _grouped(inputs))
    if backend == "triton" and head_dim is not None and not has_kernels(head_dim):
        return f"its kernels take a head_dim in multiples of 8 from 32 to 128, not {head_dim}; use backend='sdpa'"
    return None


def _grouped(inputs: Sequence[Any]) -> bool:
    """Whether k has fewer heads than q; packed, that is a tensor (B, T, H + 2 H_kv, head_dim)."""
    # In two steps: under torch.compile a comparison of dynamic sizes is a symbol, which no constant can depend on.
    if len(inputs) == 3 and inputs[0].shape[2] == inputs[1].shape[2]:
        return False
    return len(inputs) == 3 or (len(inputs) == 1 and inputs[0].ndim == 4)
