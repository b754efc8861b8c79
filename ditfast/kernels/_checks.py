"""Argument checks shared by the ops: every message names what was given, what was expected and what to do."""

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch


def check_dims(
    op: str,
    dims: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor | None],
    optional: Collection[str] = (),
) -> dict[str, int]:
    """Sizes of the named dims; ValueError where a tensor's shape disagrees with `dims` (`{"x": "B T D", "w": "3 D"}`).

    A number in `dims` is a fixed size, a first "..." any leading dims. Those of `optional` may be None; the others are
    tensors on one device.
    """
    sizes: dict[str, int] = {}
    first: torch.Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
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


def check_not_empty(op: str, sizes: Mapping[str, int], *dims: str) -> None:
    """ValueError naming the first of these dims that is 0."""
    for dim in dims:
        if sizes[dim] == 0:
            raise ValueError(f"{op}: {dim} is 0, expected at least 1; look at the shapes of the arguments")


def sample_dims(op: str, name: str, tensor: torch.Tensor) -> str:
    """Dims of a tensor (B, C, ...) by name, for `check_dims`; ValueError where it is none."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name} is a {type(tensor).__name__}, expected a torch.Tensor (B, C, ...)")
    if tensor.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (B, C, ...)")
    return " ".join(["B", "C", *(f"S{i}" for i in range(1, tensor.ndim - 1))])


def check_floating(op: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """ValueError naming the first tensor whose dtype is not a floating-point one."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype; convert it first"
            )


def check_out_dtype(op: str, out_dtype: torch.dtype, name: str = "out_dtype") -> None:
    """ValueError where this is no floating-point dtype."""
    if not isinstance(out_dtype, torch.dtype) or not out_dtype.is_floating_point:
        raise ValueError(f"{op}: {name} is {out_dtype!r}, expected a floating-point torch.dtype")


def check_number(op: str, name: str, value: float) -> None:
    """ValueError where this is no finite real number; True and False are none."""
    real = isinstance(value, (float, int, torch.SymFloat, torch.SymInt, Real)) and not isinstance(value, bool)
    if not real or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number; True and False are none."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def check_whole(op: str, name: str, value: int, least: int) -> None:
    """ValueError where this is no whole number, or below `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{op}: {name} is {value!r}, expected a whole number of at least {least}")


def check_even_heads(op: str, num_heads: int | None, H: int) -> None:
    """ValueError where num_heads is given beside qkv (B, T, 3, H, head_dim) and is not H."""
    if num_heads is not None and (not is_whole(num_heads) or num_heads != H):
        raise ValueError(
            f"{op}: num_heads is {num_heads!r} and qkv (B, T, 3, H, head_dim) has H={H}; leave num_heads out, or pass "
            "qkv (B, T, num_heads + 2 kv_heads, head_dim)"
        )


def check_flag(op: str, name: str, value: bool) -> None:
    """ValueError where this is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} is {value!r}, expected True or False")


def check_contiguous(op: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """ValueError naming the first tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected a contiguous tensor; copy it first")
