"""Argument checks shared by the ops: every message names what was given, what was expected and what to do."""

from collections.abc import Mapping

import torch


def check_dims(op: str, dims: Mapping[str, str], tensors: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
    """Sizes of the named dims; ValueError where a tensor's shape disagrees with `dims` (`{"x": "B T D", "w": "3 D"}`).

    A number in `dims` is a fixed size, a first "..." any leading dims. Tensors that are None are skipped; the others
    must sit on one device.
    """
    sizes: dict[str, int] = {}
    first: torch.Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{op}: {name} is a {type(tensor).__name__}, expected a torch.Tensor ({dims[name]})")
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors on {first.device}; move it there")
        expected = dims[name].split()
        if expected[0] == "..." and tensor.ndim >= len(expected) - 1:
            expected = [f"{name}{i}" for i in range(tensor.ndim - len(expected) + 1)] + expected[1:]
        if tensor.ndim != len(expected):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(expected)})")
        for dim, size in zip(expected, tensor.shape, strict=True):
            wanted = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
            if size != wanted:
                known = ", ".join(d if d.isdigit() else f"{d}={sizes.get(d, '?')}" for d in expected)
                raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({known})")
    return sizes


def sample_dims(op: str, name: str, tensor: torch.Tensor) -> str:
    """Dims of a tensor (B, C, ...) by name, for `check_dims`; ValueError where it is none or a sample is empty."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name} is a {type(tensor).__name__}, expected a torch.Tensor (B, C, ...)")
    if tensor.ndim < 2 or 0 in tensor.shape[1:]:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (B, C, ...) with C, ... at least 1")
    return " ".join(["B", "C", *(f"S{i}" for i in range(1, tensor.ndim - 1))])


def check_floating(op: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """ValueError naming the first tensor whose dtype is not a floating-point one."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype; convert it first"
            )


def check_contiguous(op: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """ValueError naming the first tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected a contiguous tensor; copy it first")
