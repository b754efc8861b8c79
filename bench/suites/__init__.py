"""The suites by name, and how large their jobs are on which device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from bench.contest import Settings
from bench.rows import Job, Row
from ditfast.kernels import OpSpec
from ditfast.kernels.spec import Case
from ditfast.kernels.tune import resize

# Suite -> the module whose contests(Options) it is, an iterator of Pieces; with a table(rows) of its own if it has one.
SUITES: dict[str, str] = {
    **{name: f"bench.suites.{name}" for name in ("ops", "model", "feed", "sample", "memory", "scale")},
    "breakdown": "bench.breakdown",
    "fast-dit": "bench.tables.fast_dit",
    "mindone": "bench.tables.mindone",
}


@dataclass(frozen=True)
class Scale:
    """How large the suites' jobs are, and how long each is measured. On two idle cores of a CPU a suite is done in some
    two minutes, compilers included.

    ops      an op's cases
    dtypes   of the ops, by the names in ditfast.hardware.DTYPES
    compile  whether torch.compile enters: on a CPU it takes some 10 seconds a contest
    rounds, seconds    of one contest, at most
    """

    name: str
    ops: Callable[[OpSpec], Sequence[Case]]
    dtypes: tuple[str, ...]
    compile: bool
    rounds: int
    seconds: float


# DiT-S's width and batch 4; 48 are the parameters of five blocks for AdamW, and the heads of q, k and v.
_CPU_SIZES = {"B": 4, "T": 256, "Tq": 256, "Tk": 256, "D": 384, "F": 1536, "M": 1024, "N": 48}


def _cpu_case(spec: OpSpec) -> tuple[Case, ...]:
    """The first of an op's bench cases, in sizes for a CPU."""
    case = spec.bench[0]
    sizes = {name: min(size, _CPU_SIZES.get(name, size)) for name, size in case.sizes.items()}
    return (replace((spec.resize or resize)(case, sizes), name=f"{case.name}, smaller"),)


SMALL = Scale("small", lambda spec: spec.cases[:1], ("fp32",), compile=False, rounds=3, seconds=0.1)
CPU = Scale("cpu", _cpu_case, ("fp32",), compile=True, rounds=20, seconds=0.5)
GPU = Scale("gpu", lambda spec: spec.bench, ("bf16",), compile=True, rounds=50, seconds=2.0)


@dataclass(frozen=True)
class Options:
    """What a suite makes its contests for."""

    device: torch.device
    scale: Scale


class Piece(Protocol):
    """What a suite measures at a time; Contest is one."""

    @property
    def job(self) -> Job:
        """The rows' (suite, name, dtype, shape)."""
        ...

    def measure(self, settings: Settings) -> list[Row]:
        """The rows."""
        ...


def scale_of(device: torch.device, small: bool) -> Scale:
    """The sizes for a device."""
    return SMALL if small else GPU if device.type == "cuda" else CPU
