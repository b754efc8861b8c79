"""The precision policies of a run: which dtype what is held and computed in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ditfast.kernels.tf32 import tf32_products


@dataclass(frozen=True)
class Precision:
    """The one place that says which dtype what is held and computed in.

    `official` policies (fp32, tf32, bf16, fp16) reproduce autocast: fp32 weights and residual stream, norm and modulate
    in fp32, matrix products and attention in the compute dtype. `fast` policies keep the weights that the model reads,
    the stream and the gradients in the compute dtype, with fp32 statistics inside the norms and fp32 master weights,
    moments and EMA in the optimizer.

    Attributes: dtype of parameters, residual stream, compute (GEMMs, attention), gradients, optimizer state, EMA; and
    whether float32 products are in TF32, as the official training allows them to be on a GPU.
    """

    params: torch.dtype = torch.float32
    stream: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    grads: torch.dtype = torch.float32
    optimizer: torch.dtype = torch.float32
    ema: torch.dtype = torch.float32
    tf32: bool = False

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a loss scale."""
        return self.compute is torch.float16

    @contextmanager
    def autocast(self, device: torch.device | str) -> Iterator[None]:
        """The context of a forward; off where parameters have the compute dtype. The backward's is `products`."""
        enabled = self.compute is not self.params
        kind = torch.device(device).type
        with torch.autocast(kind, dtype=self.compute if enabled else None, enabled=enabled), self.products():
            yield

    def products(self) -> AbstractContextManager[None]:
        """The context of a backward: without it TF32 becomes IEEE there, recomputed products with it. No autocast."""
        return tf32_products() if self.tf32 else nullcontext()

    def apply(self, model: Any) -> Any:
        """Casts a DiT's parameters and sets the dtype of its residual stream; returns the model."""
        model.stream_dtype = self.stream
        return model.to(self.params)


def _fast(dtype: torch.dtype) -> Precision:
    return Precision(params=dtype, stream=dtype, compute=dtype, grads=dtype)


PRECISIONS = {
    "fp32": Precision(),
    "tf32": Precision(tf32=True),
    "bf16": Precision(compute=torch.bfloat16),
    "fp16": Precision(compute=torch.float16),
    "bf16-fast": _fast(torch.bfloat16),
    "fp16-fast": _fast(torch.float16),
}
