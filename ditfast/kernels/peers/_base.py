"""What the adapters share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class PeerError(RuntimeError):
    """A peer that cannot run here, or not on these arguments; the message says why."""


@contextmanager
def importing(library: str, install: str) -> Iterator[None]:
    """PeerError, saying how to get the library, where an import inside fails."""
    try:
        yield
    except ImportError as error:
        raise PeerError(f"{library} is missing ({error}); {install}") from error


def require_one_dtype(library: str, inputs: Mapping[str, Any], *dtypes: torch.dtype) -> None:
    """PeerError unless the tensors have one dtype, one of `dtypes` if there are any."""
    found = {value.dtype for value in inputs.values() if isinstance(value, torch.Tensor)}
    if len(found) > 1:
        raise PeerError(f"{library} takes tensors of one dtype, these are {', '.join(sorted(map(str, found)))}")
    if dtypes and not found <= set(dtypes):
        raise PeerError(f"{library} takes {', '.join(map(str, dtypes))}, these are {', '.join(map(str, found))}")
