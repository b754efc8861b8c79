"""Bytes that every Triton kernel moves, counted in the interpreter from the addresses of its loads and stores.

requested  bytes of all live lanes: what the L2 serves. Masked-off lanes do not count.
unique     distinct bytes read plus distinct bytes written, launch by launch: what the memory must move when the L2
           catches every repeat inside a launch. Partial rows count twice, written by one kernel and read by the next.
Both over SPEC.bytes_min. The shapes are those of the benches with fewer samples; on such small grids the launchers
would make their programs smaller, so _rows.MIN_PROGRAMS is 0 while counting: a program then takes as many rows as at
the real batch. Work of a stage that is not a Triton launch does not show, so a stage of library calls has no row.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from . import _rows, _triton
from .spec import Case, OpSpec

LIMITS = {"requested": 1.30, "unique": 1.05}
SAMPLES = 2


@dataclass(frozen=True)
class Launched:
    """One launch: bytes requested, and distinct bytes read and written."""

    kernel: str
    requested: int
    unique: int


@dataclass(frozen=True)
class Row:
    """One stage ("fwd" or "bwd") of an op; launches holds each kernel's share, limits what the op has for LIMITS."""

    op: str
    case: str
    stage: str
    bytes_requested: int
    bytes_unique: int
    bytes_min: int
    launches: tuple[Launched, ...]
    limits: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Bytes requested and unique bytes over the minimum, by the names in LIMITS."""
        return {"requested": self.bytes_requested / self.bytes_min, "unique": self.bytes_unique / self.bytes_min}

    @property
    def ok(self) -> bool:
        """Both ratios within the op's limits, else LIMITS."""
        return all(self.ratios[name] <= self.limits.get(name, limit) for name, limit in LIMITS.items())


class _Counter:
    """Addresses of one launch by direction and size of an element."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.touched: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def add(self, direction: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        self.touched[direction, size].append(pointers.data[live].ravel())

    def total(self) -> Launched:
        requested = sum(size * sum(map(len, found)) for (_, size), found in self.touched.items())
        unique = sum(size * _distinct(np.concatenate(found)) for (_, size), found in self.touched.items())
        return Launched(self.kernel, requested, unique)


def _distinct(addresses: np.ndarray) -> int:
    """How many different ones there are; by sorting, several times as fast as np.unique."""
    addresses.sort()
    return int(np.count_nonzero(np.diff(addresses))) + 1 if len(addresses) else 0


@contextmanager
def counting() -> Iterator[list[Launched]]:
    """Collect one Launched per launch inside. Loads and stores without a mask pass through the masked form as well."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    done: list[Launched] = []
    current: _Counter | None = None

    def counted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        assert current is not None
        current.add("read", pointers, mask)
        return load(pointers, mask, *rest, **named)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        assert current is not None
        current.add("write", pointers, mask)
        return store(pointers, value, mask, *rest, **named)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal current
        current = _Counter(self.fn.__name__)
        call(self, *args, **kwargs)
        done.append(current.total())

    with (
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(executor, "__call__", counted_call),
    ):
        yield done


def cases(spec: OpSpec) -> tuple[Case, ...]:
    """What is counted: the spec's own traffic cases, or its benches at DiT-XL/2 with SAMPLES samples."""
    if spec.traffic is not None:
        return spec.traffic
    return tuple(replace(case, sizes={**case.sizes, "B": SAMPLES}) for case in spec.bench if "DiT-XL" in case.name)


def traffic(specs: Sequence[OpSpec], dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """One Row per stage of every spec that has a Triton side and every case; RuntimeError without the interpreter."""
    if not _triton.INSTALLED or not _triton.INTERPRETED:
        raise RuntimeError("the traffic count needs triton's interpreter: set TRITON_INTERPRET=1 in the environment")
    with patch.object(_rows, "MIN_PROGRAMS", 0):
        for spec in specs:
            for case in cases(spec) if "triton" in spec.op.backends else ():
                yield from _count(spec, case, dtype)


def _count(spec: OpSpec, case: Case, dtype: torch.dtype) -> Iterator[Row]:
    inputs = spec.make_inputs(case, dtype, generator=torch.Generator().manual_seed(0))
    bytes_min = spec.bytes_min(inputs)
    limits = spec.limits(inputs) if callable(spec.limits) else spec.limits
    leaves = [v.requires_grad_() for v in spec.graded(inputs).values()]
    stages: dict[str, list[Launched]] = {}
    with counting() as stages["fwd"]:
        outputs = spec.call(inputs, "triton")
    graded = [out for out in outputs if out.requires_grad]
    with counting() as stages["bwd"]:
        if graded:
            torch.autograd.grad(graded, leaves, [torch.ones_like(out) for out in graded], allow_unused=True)
    for stage, launched in stages.items():
        if launched:
            requested, unique = sum(one.requested for one in launched), sum(one.unique for one in launched)
            yield Row(spec.name, case.name, stage, requested, unique, bytes_min[stage], tuple(launched), limits)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, a line per stage and one per launch below it."""
    head = ("op", "case", "stage", "requested", "unique", "minimum", "requested / min", "unique / min", "")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        ratios = (f"{row.ratios['requested']:.3f}", f"{row.ratios['unique']:.3f}")
        verdict = "ok" if row.ok else "TOO MUCH"
        total = (f"{row.bytes_requested:,}", f"{row.bytes_unique:,}", f"{row.bytes_min:,}")
        lines.append((row.op, row.case, row.stage, *total, *ratios, verdict))
        for one in row.launches:
            lines.append((f"  {one.kernel}", "", "", f"{one.requested:,}", f"{one.unique:,}", *[""] * 4))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain objects."""
    return [asdict(row) for row in rows]
