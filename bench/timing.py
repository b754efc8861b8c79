"""Time and peak memory of runs: in turns, on a GPU between CUDA events, on a CPU by the clock; the median counts."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ditfast.kernels.tune import DeviceTimer

SHORTEST = 1e-3  # seconds of a sample on a CPU: what is shorter is run several times, as the clock and its call cost
FEWEST = 3  # samples of each run, however long they are


@dataclass(frozen=True)
class Prepared:
    """A run that needs something made each time, `run(prepare())`, of which the making is not timed.

    A backward needs a graph that no backward went through yet, an op in place the tensors as they were.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], object]

    def __call__(self) -> object:
        return self.run(self.prepare())


Run = Callable[[], object] | Prepared


@dataclass(frozen=True)
class Timing:
    """Samples in milliseconds."""

    samples: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        """A fifth of the samples are below."""
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        """A fifth of the samples are above."""
        return self.quantile(0.8)

    def quantile(self, q: float) -> float:
        """The value below which the share `q` of the samples lies, between two samples by their distance."""
        ordered = sorted(self.samples)
        whole, part = divmod(q * (len(ordered) - 1), 1)
        low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
        return low + part * (high - low)


def interleaved(
    runs: Mapping[str, Run],
    device: str | torch.device,
    *,
    rounds: int = 50,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """The Timing of each run by name: warmed up, then one sample each in turn, up to `rounds` or `seconds` in all.

    Every round starts with another run, so that what one leaves behind meets each of the others. On a CPU a sample of
    a short run is the mean of several; on a GPU the L2 is flushed before each sample and the host's time is hidden
    behind that, as long as the run does not wait for the device. `clock` gives seconds.
    """
    if not runs:
        return {}
    take = _on_gpu(runs, torch.device(device)) if torch.device(device).type == "cuda" else _on_cpu(runs, clock)
    names, samples = list(runs), {name: list[float]() for name in runs}
    start = clock()
    for turn in range(max(rounds, FEWEST)):
        if turn >= FEWEST and clock() - start >= seconds:
            break
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            samples[name].append(take(name))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def _on_cpu(runs: Mapping[str, Run], clock: Callable[[], float]) -> Callable[[str], float]:
    """What takes a sample of a run on the CPU, in milliseconds."""

    def once(run: Run, times: int = 1) -> float:
        body = ready(run)
        start = clock()
        for _ in range(times):
            body()
        return clock() - start

    times = {}
    for name, run in runs.items():
        run()
        times[name] = repeats(run, once(run))
    return lambda name: 1e3 * once(runs[name], times[name]) / times[name]


def repeats(run: Run, seconds: float) -> int:
    """How often a run that takes so long is made in one sample on a CPU."""
    return 1 if isinstance(run, Prepared) or seconds <= 0 else max(1, round(SHORTEST / seconds))


def _on_gpu(runs: Mapping[str, Run], device: torch.device) -> Callable[[str], float]:
    """What takes a sample of a run on the GPU, in milliseconds."""
    timer = DeviceTimer(device)
    host = {}
    for name, run in runs.items():
        run()
        host[name] = timer.host_seconds(ready(run))
    return lambda name: timer(ready(runs[name]), host[name])


def ready(run: Run) -> Callable[[], object]:
    """The part of a run that is timed, all else done."""
    return partial(run.run, run.prepare()) if isinstance(run, Prepared) else run


def peak_bytes(run: Run, device: str | torch.device) -> int:
    """The most bytes allocated during a run above what was allocated before it, by PyTorch's allocator.

    What a Prepared run prepares is there before. On a CPU the allocator's reports are read by the profiler, since a
    dispatch mode does not see what compiled code allocates.
    """
    device, body = torch.device(device), ready(run)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        body()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _muted():
        profiler.start()
    try:
        body()
    finally:
        with _muted():
            profiler.stop()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _muted() -> Iterator[None]:
    """No standard error: of PyTorch 2.13 the profiler's start and stop write lines there whatever the log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
