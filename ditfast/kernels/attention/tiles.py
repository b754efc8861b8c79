"""What the launchers of attention share: the split of head_dim, strides of (B, T, H, head_dim) views, constants."""

from typing import Any

import torch

from .._triton import capability, rows
from ..autotune import pick
from ..tf32 import dot_precision

# (least compute capability, bytes of an element, 3 for float32 whose products are in TF32, largest head_dim,
#  rows of the tile that stays, rows of those that pass by, warps, stages); the first that fits is taken.
Configs = tuple[tuple[int, int, int, int, int, int, int], ...]


def has_kernels(head_dim: int) -> bool:
    """Whether head_dim is a multiple of 8 from 32 to 128."""
    return 32 <= head_dim <= 128 and head_dim % 8 == 0


def head_widths(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and one (or 0) that covers the rest, at least 16 as dots want it: 72 = 64 + 16."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, max(16, 1 << (head_dim - main - 1).bit_length()) if main < head_dim else 0


def group(q: torch.Tensor, k: torch.Tensor) -> int:
    """Heads of q (B, Tq, H, head_dim) to one of k (B, Tk, H_kv, head_dim)."""
    return max(1, q.shape[2] // max(1, k.shape[2]))


def dense(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor itself where its last dim is dense, else a contiguous copy."""
    return tuple(map(rows, tensors))


def strides(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(unit, the strides of B, T and H of each tensor in that unit); the unit is 8 where it divides them all, else 1.

    Triton learns of an integer only whether 16 divides it, and loads one element at a time where it does not, as with
    the head stride 72 of DiT-XL. Kernels multiply by the unit, and so know of the 8.
    """
    plain = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 1 if any(stride % 8 for stride in plain) else 8
    return unit, [stride // unit for stride in plain]


def constants(
    q: torch.Tensor, configs: Configs, unit: int, kernel: str | None = None, k: torch.Tensor | None = None
) -> dict[str, Any]:
    """The constants of a launch but for those about the lengths; ValueError for a head_dim that has no kernel.

    Where the kernel is named, a measured config of it may take the place of the one in `configs`.
    """
    head_dim = q.shape[-1]
    if not has_kernels(head_dim):
        raise ValueError(f"attention: head_dim is {head_dim}, the Triton kernels take multiples of 8 from 32 to 128")
    main, tail = head_widths(head_dim)
    precision = dot_precision(q.dtype)
    chip, size = capability(q.device), 3 if precision == "tf32" else q.element_size()
    *_, stays, passes, warps, stages = next(c for c in configs if c[0] <= chip and c[1] == size and c[2] >= head_dim)
    if kernel:
        facts = (q, k, unit, *(["tf32"] if precision == "tf32" else []))
        stays, passes, stages, warps = pick(kernel, (stays, passes, stages, warps), *facts)
    return {
        **{"HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail, "UNIT": unit, "STAYS": stays, "PASSES": passes},
        **{"PRECISION": precision, "num_warps": warps, "num_stages": stages},
    }
