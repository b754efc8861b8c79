"""Triton's interpreter, mended for as long as a kernel of ours runs; other people's kernels keep theirs.

The interpreter (3.6 to 3.9) stores bfloat16 as uint16 and then forgets it: arithmetic, reductions and `tl.dot` work on
the bit patterns, and casts from float32 truncate. Here casts round to nearest even, dots go through float32 (exact: a
product of two bfloat16 fits), and native bfloat16 arithmetic raises, since on the chip it would round where we mean
not to. Dots in TF32, exact otherwise, cut float32 operands to its ten bits of mantissa.
A loop bound held in a tensor becomes an integer in 3.6 as well, whose way of doing so NumPy 2.4 refuses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

_ARITHMETIC = ("binary_op", "unary_op", "create_fma")


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """The same values as float32, where they are bfloat16."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: TensorHandle) -> TensorHandle:
    """The values as bfloat16, to nearest even; infinities stay, NaN becomes quiet."""
    values = handle.data.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return TensorHandle(data.astype(np.uint16), tl.bfloat16)


def _cut(handle: TensorHandle) -> TensorHandle:
    """float32 without the bits that TF32 lacks."""
    if handle.dtype.scalar != tl.float32:
        return handle
    return TensorHandle((handle.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), tl.float32)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    src = _widen(src)
    return _narrow(src) if dst_type.scalar == tl.bfloat16 else InterpreterBuilder.cast_impl(self, src, dst_type)


def _fp_to_fp(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding: Any) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTNE:
        raise NotImplementedError("the interpreter casts to bfloat16 by rounding to nearest even only")
    if dst_type.scalar == tl.bfloat16 or _is_bf16(src):
        return _cast(self, src, dst_type)
    return InterpreterBuilder.create_fp_to_fp(self, src, dst_type, rounding)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *rest: Any
) -> TensorHandle:
    if precision == interpreter._ir.INPUT_PRECISION.TF32:
        a, b = _cut(a), _cut(b)
    return InterpreterBuilder.create_dot(self, _widen(a), _widen(b), d, precision, *rest)


def _refuse_bf16(operands: Any) -> None:
    if any(isinstance(operand, TensorHandle) and _is_bf16(operand) for operand in operands):
        raise TypeError("native bfloat16 arithmetic in a kernel: cast to float32 first, with .to(tl.float32)")


def _guarded(name: str) -> Callable[..., TensorHandle]:
    plain = getattr(InterpreterBuilder, name)

    def method(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        _refuse_bf16(args)
        return plain(self, *args)

    return method


def _check_tensor(self: ReduceScanOpInterface, tensors: Any) -> None:
    _refuse_bf16(tensor.handle for tensor in tensors)
    _PLAIN_CHECK(self, tensors)


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    _PLAIN_PATCH(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]


_PLAIN_CHECK = ReduceScanOpInterface.check_tensor
_PLAIN_PATCH = interpreter._patch_lang_tensor
_MENDED = {"cast_impl": _cast, "create_fp_to_fp": _fp_to_fp, "create_dot": _dot} | {n: _guarded(n) for n in _ARITHMETIC}


@contextmanager
def mended() -> Iterator[None]:
    """Mend the interpreter inside the block; not for threads that interpret at the same time."""
    builder = interpreter.interpreter_builder
    vars(builder).update({name: method.__get__(builder) for name, method in _MENDED.items()})
    ReduceScanOpInterface.check_tensor = _check_tensor
    interpreter._patch_lang_tensor = _patch_lang_tensor
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = _PLAIN_PATCH
        ReduceScanOpInterface.check_tensor = _PLAIN_CHECK
        for name in _MENDED:
            del vars(builder)[name]
