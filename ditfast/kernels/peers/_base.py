"""What the adapters share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class PeerError(RuntimeError):
    """A peer that cannot run here, or not on these arguments; the message says why."""


@dataclass(frozen=True)
class Library:
    """How to get a library, and where it runs."""

    name: str
    install: str
    devices: tuple[str, ...] = ("cuda",)


APEX = Library(
    "NVIDIA apex with its extensions",
    "build it from github.com/NVIDIA/apex (`apex` on PyPI is another package)",
)
DIFFUSERS = Library("diffusers", "pip install diffusers", ("cuda", "cpu"))
FLASH_ATTN = Library("flash-attn", "pip install flash-attn --no-build-isolation")
LIGER = Library("Liger-Kernel", "pip install 'liger-kernel>=0.8'")
TRANSFORMER_ENGINE = Library("Transformer Engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'")
XFORMERS = Library("xformers", "pip install xformers")


@contextmanager
def importing(library: Library, device: torch.device) -> Iterator[None]:
    """PeerError where an import inside fails, saying how to get the library, or where it does not run on the device."""
    try:
        yield
    except ImportError as error:
        raise PeerError(f"{library.name} is missing ({error}); {library.install}") from error
    if _kind(device) not in library.devices:
        raise PeerError(f"{library.name} needs tensors on {' or '.join(library.devices)}, these are on {device.type}")


def _kind(device: torch.device) -> str:
    return device.type


def require_one_dtype(library: str, inputs: Mapping[str, Any], *dtypes: torch.dtype) -> None:
    """PeerError unless the tensors have one dtype, one of `dtypes` if there are any."""
    found = {value.dtype for value in inputs.values() if isinstance(value, torch.Tensor)}
    if len(found) > 1:
        raise PeerError(f"{library} takes tensors of one dtype, these are {', '.join(sorted(map(str, found)))}")
    if dtypes and not found <= set(dtypes):
        raise PeerError(f"{library} takes {', '.join(map(str, dtypes))}, these are {', '.join(map(str, found))}")
