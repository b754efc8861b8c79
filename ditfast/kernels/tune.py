"""Measure configs around the pinned ones on this GPU, for `python -m ditfast.kernels tune`; autotune.py uses them.

From the pinned config one number is doubled or halved at a time; the fastest neighbour is the next centre, as long as
one is faster by MARGIN. Only candidates that compile without spills and pass parity are measured. Timed is the raw op,
a whole forward or backward, so that a tile which makes the sum of partial rows dearer pays for it: device time between
CUDA events, inputs out of the L2, candidates in turn, the median.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from . import _triton, autotune, check, parity
from ._source import source_hash
from .autotune import MAX_WARPS, Choice, Config
from .spec import Case, OpSpec, RawCalls
from .tf32 import tf32_fact

MARGIN = 0.02  # what is faster by less is within the scatter, and not worth other bits
HOPS = 4
ROUNDS = 40
FLUSH = 512 * 2**20  # bytes written before each run: several times any L2
log = logging.getLogger("ditfast.kernels")


@dataclass(frozen=True)
class Run:
    """A raw op on its arguments, forward or backward, under one config."""

    func: Any
    args: tuple[Any, ...]
    key: str
    config: Config

    @torch.no_grad()
    def __call__(self) -> None:
        """Run it."""
        with autotune.trying(self.key, self.config):
            self.func(*self.args)


Measure = Callable[[Sequence[Run]], list[float]]


@dataclass(frozen=True)
class Kernel:
    """A kernel whose config is sought, in a stage of a case; key as `autotune.pick` makes it."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    truth: parity.Truth
    func: Any
    args: tuple[Any, ...]
    key: str
    pinned: Config

    def under(self, config: Config) -> Run:
        """A run of the stage under this config."""
        return Run(self.func, self.args, self.key, config)

    def is_right(self, config: Config) -> bool:
        """Whether outputs and gradients stay within the budgets under this config."""
        with autotune.trying(self.key, config):
            return all(verdict.ok for verdict in self.truth.judge("triton"))

    def compiles(self, config: Config) -> bool:
        """Whether the launches that it changes compile for this GPU, without spills, within its shared memory."""
        pinned = check.launches(self.spec, self.case, self.dtype)
        with autotune.trying(self.key, config):
            changed = check.launches(self.spec, self.case, self.dtype)
        try:
            return all(
                check.inspect(self.spec.name, self.case.name, _arch(), new).ok
                for old, new in zip(pinned, changed, strict=True)
                if new.meta != old.meta
            )
        except Exception as error:  # Whatever a compiler raises: the candidate is none.
            log.debug("%s under %s does not compile: %s", self.key, config, error)
            return False


def _arch() -> str:
    return "sm_" + autotune.machine()[1].replace(".", "")


def tune(
    specs: Sequence[OpSpec],
    dtype: torch.dtype = torch.bfloat16,
    sizes: Mapping[str, int] | None = None,
    known: Collection[str] = (),
    device: str = "cuda",
    measure: Measure | None = None,
    compiles: Callable[[Kernel, Config], bool] = Kernel.compiles,
) -> Iterator[Choice]:
    """One Choice per kernel and bench case of the specs, `sizes` in place of the case's own; keys in `known` are left.

    A case that has no such sizes, as a latent of 1000 tokens, is left out with a warning.

    `measure` gives milliseconds of each run, `compiles` says whether a candidate does: both have stand-ins in tests.
    RuntimeError where there is no GPU to measure on, or where a kernel fails parity under its pinned config; ValueError
    for a size that no case has.
    """
    sizes, specs = sizes or {}, [spec for spec in specs if "triton" in spec.op.backends]
    there = sorted({name for spec in specs for case in spec.bench for name in case.sizes})
    if unknown := sizes.keys() - there:
        raise ValueError(f"no case has the size {min(unknown)!r}, expected some of {', '.join(there)}")
    if measure is None:
        _require_gpu()
        measure = time_on_gpu
    done = set(known)
    here, hashes = autotune.machine(), {spec.name: source_hash(spec.source) for spec in specs}
    for spec in specs:
        for case in spec.bench:
            given = {name: size for name, size in sizes.items() if name in case.sizes}
            try:
                case = (spec.resize or resize)(case, given)
                asked = asks(spec, case, dtype)
            except ValueError as error:
                if not given:
                    raise
                log.warning("%s, %s: left out, %s", spec.name, case.name, error)
                continue
            for kernel in _kernels(spec, case, dtype, device, done) if asked - done else ():
                done.add(kernel.key)
                config, pinned_ms, ms = fastest(kernel, measure, compiles)
                yield Choice(spec.name, kernel.key, hashes[spec.name], *here, kernel.pinned, config, pinned_ms, ms)


def resize(case: Case, sizes: Mapping[str, int]) -> Case:
    """The case with these sizes in place of its own."""
    return replace(case, sizes={**case.sizes, **sizes})


def asks(spec: OpSpec, case: Case, dtype: torch.dtype) -> set[str]:
    """The keys that the op's launchers ask a config for in this case; ValueError for sizes that cannot be."""
    with autotune.asking() as asked:
        check.launches(spec, case, dtype)
    return set(asked)


def _require_gpu() -> None:
    """RuntimeError, saying what to do, where nothing can be compiled for this GPU and measured on it."""
    if not torch.cuda.is_available():
        raise RuntimeError("tune measures on a GPU, and PyTorch sees none here: run it where the model will run")
    if not _triton.INSTALLED or _triton.INTERPRETED:
        raise RuntimeError("tune needs triton, and a process without TRITON_INTERPRET in its environment")
    if _arch() not in check.SHARED_LIMITS:
        raise RuntimeError(f"tune does not know {_arch()}: add its shared memory to SHARED_LIMITS in check.py")


def _kernels(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, done: Collection[str]) -> Iterator[Kernel]:
    """What the op's launchers ask a config for in this case, but for the keys that are done."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = spec.make_inputs(case, dtype, device, generator)
    truth = parity.truth(spec, inputs, generator, bool(tf32_fact(dtype)))
    with RawCalls() as raw:
        verdicts = truth.judge("triton")
    if wrong := [verdict for verdict in verdicts if not verdict.ok]:
        raise RuntimeError(f"{spec.name}, {case.name}: fails parity as it is, so nothing was measured: {wrong}")
    for func, args in raw.made:
        with torch.no_grad(), autotune.asking() as asked:
            func(*args)
        for key, pinned in asked.items():
            if key not in done:
                yield Kernel(spec, case, dtype, truth, func, args, key, pinned)


def fastest(
    kernel: Kernel, measure: Measure, compiles: Callable[[Kernel, Config], bool]
) -> tuple[Config, float, float]:
    """(the fastest config found, milliseconds under the pinned one, milliseconds under it)."""
    pinned = best = kernel.pinned
    tried = {pinned}
    for _ in range(HOPS):
        fresh = [c for c in neighbours(best) if c not in tried]
        tried |= set(fresh)
        right = [c for c in fresh if compiles(kernel, c) and kernel.is_right(c)]
        centre, *times = measure([kernel.under(c) for c in (best, *right)])
        ms, nearest = min(zip(times, right, strict=True), default=(centre, best))
        if ms > centre * (1 - MARGIN):
            break
        best = nearest
    # Once more side by side: the hops were measured minutes apart.
    pinned_ms, ms = measure([kernel.under(c) for c in (pinned, best)])
    return (best, pinned_ms, ms) if ms < pinned_ms * (1 - MARGIN) else (pinned, pinned_ms, pinned_ms)


def neighbours(config: Config) -> list[Config]:
    """The configs with one number doubled or halved, in whole numbers; at most MAX_WARPS warps."""
    found = []
    for i, number in enumerate(config):
        for other in (number // 2, number * 2):
            if other and not (i == len(config) - 1 and other > MAX_WARPS):
                found.append((*config[:i], other, *config[i + 1 :]))
    return found


class DeviceTimer:
    """Device time of a run between CUDA events, the L2 flushed before it."""

    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.device = torch.device(device)
        self.buffer = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
        self.flush_seconds = 0.0
        self(self.buffer.zero_)
        self.flush_seconds = self(self.buffer.zero_) / 1e3

    def host_seconds(self, run: Callable[[], object]) -> float:
        """How long the host takes to launch a run."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return seconds

    def __call__(self, run: Callable[[], object], hide: float = 0.0) -> float:
        """Milliseconds of a run; the flush lasts longer than `hide` seconds of the host, or launches would show."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            for _ in range(1 + int(hide / self.flush_seconds) if self.flush_seconds else 1):
                self.buffer.zero_()
            start.record()
            run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)


def time_on_gpu(runs: Sequence[Run]) -> list[float]:
    """Median milliseconds of each run, in turn."""
    timer = DeviceTimer()
    for run in runs:
        run()
    hidden = [timer.host_seconds(run) for run in runs]
    rounds = [[timer(run, hide) for run, hide in zip(runs, hidden, strict=True)] for _ in range(ROUNDS)]
    return [median(samples) for samples in zip(*rounds, strict=True)]
