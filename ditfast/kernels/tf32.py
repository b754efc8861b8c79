"""Whether float32 products are TF32, by PyTorch's own setting for its products on a GPU.

One setting for all backends: torch.backends.cuda.matmul, which set_float32_matmul_precision sets too, and which is
IEEE unless the user asks. The kernels read it at every launch, as cuBLAS does: no backend changes what was asked for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_before: tuple[str, str | None] | None = None


def dot_precision(dtype: torch.dtype) -> str:
    """What a tl.dot of operands of this dtype takes as input_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tf32_fact(dtype: torch.dtype) -> tuple[str, ...]:
    """What the key of a measured config says of the products."""
    return ("tf32",) if dot_precision(dtype) == "tf32" else ()


@contextmanager
def tf32_products() -> Iterator[None]:
    """Have float32 products in TF32 for the block's duration, in all threads: PyTorch's setting is the process's.

    Blocks may overlap in several threads; the last one to end sets back what the first has found.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _set_tf32()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _before is not None:
                _set_back(*_before)


def _set_tf32() -> tuple[str, str | None] | None:
    """What there was before, by its newer and, where PyTorch can tell, its older name; None for TF32 itself."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == "tf32":
        return None
    if before == torch.backends.cudnn.fp32_precision:  # the setting of all CUDA libraries, which products follow
        before = "none"
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    # The older name sets the newer one too; after the other way round PyTorch refuses to read the older.
    matmul.allow_tf32 = True
    return before, older


def _set_back(before: str, older: str | None) -> None:
    matmul = torch.backends.cuda.matmul
    if older in ("high", "medium"):
        torch.set_float32_matmul_precision(older)
    else:
        matmul.allow_tf32 = False
    matmul.fp32_precision = before
