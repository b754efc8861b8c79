"""Tables that a kernel looks up, while a CUDA graph is captured: written when that is over, kept with the graph.

A copy from the host would become part of the graph, and read the host's memory at every replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_capture: tuple[list[Any], list[tuple[torch.Tensor, torch.Tensor]]] | None = None


@contextmanager
def captured_tables() -> Iterator[list[Any]]:
    """To be entered around the capture of a CUDA graph with `adamw_ema` in it.

    Yields a list that must live as long as the graph: on leaving it holds the tables that kernels read at replay.
    """
    global _capture
    if _capture is not None:
        raise RuntimeError("captured_tables is entered already: capture one CUDA graph after the other")
    kept: list[Any] = []
    late: list[tuple[torch.Tensor, torch.Tensor]] = []
    _capture = kept, late
    try:
        yield kept
    finally:
        _capture = None
    for table, values in late:
        table.copy_(values)


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` as a tensor on the device, without making the host wait; under a capture written when that is over."""
    cuda = device.type == "cuda"
    if _capture is not None:
        host = torch.tensor(values, dtype=dtype)
        table = torch.empty(host.shape, dtype=dtype, device=device)
        _capture[1].append((table, host))
        return table
    if cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph with this op must be captured inside ditfast.kernels.captured_tables()")
    # Pinned: a copy from pageable memory would wait for the device.
    return torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=True)


def look_up(tables: Callable[..., Any], *key: Any) -> Any:
    """tables(*key), an lru_cache'd maker of tables; under a capture made anew, and kept for the graph."""
    if _capture is None:
        return tables(*key)
    made = tables.__wrapped__(*key)  # type: ignore[attr-defined]  # the cache would drop or reuse the graph's memory
    _capture[0].append(made)
    return made
