"""Whether float32 products are TF32, by PyTorch's own setting for its products on a GPU.

One setting for all backends: torch.backends.cuda.matmul, which set_float32_matmul_precision sets too, and which is
IEEE unless the user asks. The kernels read it at every launch, as cuBLAS does: no backend changes what was asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """What a tl.dot of operands of this dtype takes as input_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextmanager
def tf32_products() -> Iterator[None]:
    """Have float32 products in TF32 for the block's duration."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == "tf32":
        yield
        return
    # The older name sets the newer one too; after the other way round PyTorch refuses to read the older.
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before
