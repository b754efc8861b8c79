"""Triton as the ops see it: `jit`, `tl` and `launch`, on a GPU, in the interpreter, under a recorder, or absent.

Triton decides between compiler and interpreter when `jit` decorates, so TRITON_INTERPRET=1 must be in the environment
before triton is first imported. Without Triton the kernels are plain functions that nobody launches.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    INSTALLED, IMPORT_ERROR, VERSION = True, "", triton.__version__
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    jit = triton.jit
except ImportError as error:
    INSTALLED = INTERPRETED = False
    IMPORT_ERROR, VERSION = str(error), "none"

    class tl:  # type: ignore[no-redef]
        """What the signatures of the kernels name."""

        constexpr = object

    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
        """Leave `fn` as it is."""
        return fn


if INTERPRETED:
    from ._interpreter import mended


class Launch(NamedTuple):
    """One launch as `recording` saw it."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorder: list[Launch] | None = None
_recorded_capability = 90


@contextmanager
def recording(capability: int = 90) -> Iterator[list[Launch]]:
    """Collect the launches inside and run none: with meta tensors, what would run on a GPU shows without one.

    capability is that of the GPU: 90 for sm_90.
    """
    global _recorder, _recorded_capability
    outer, _recorder, _recorded_capability = (_recorder, _recorded_capability), [], capability
    try:
        yield _recorder
    finally:
        _recorder, _recorded_capability = outer


def capability(device: torch.device) -> int:
    """90 for an sm_90; off a GPU that of the recording, and of the newest features that the interpreter knows."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return _recorded_capability


def is_recording() -> bool:
    """Whether `recording` is in force, so that an op on meta tensors must go through its launcher."""
    return _recorder is not None


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of `kernel` on a one-dimensional grid, on the device of args[0]; none is fine."""
    # Triton's default is about to change, and would be read from the environment.
    meta["enable_fp_fusion"] = True
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, args, meta))
    elif programs:
        with _environment(args[0].device):
            kernel[(programs,)](*args, **meta)


def _environment(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'; the interpreter needs mending."""
    if INTERPRETED:
        return mended()
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dim is dense, as the kernels assume, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def samples(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor (B, ...) itself where each sample is contiguous, whatever lies between two, else a contiguous copy."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def descriptor(matrix: torch.Tensor, box: tuple[int, int]) -> Any:
    """What a kernel's TMA reads boxes of this size by; the matrix has dense rows, 16-byte aligned."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(box))


def two_widths(D: int) -> tuple[int, int]:
    """D as a power of two that it fills and one (or 0) for the rest: 1152 = 1024 + 128, where 2048 would idle 44 %."""
    main = 1 << (D.bit_length() - 1)
    return main, 1 << (D - main - 1).bit_length() if main < D else 0
