"""A contest: one job and those who do it. None is timed that did not show first that it does the job."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.rows import COMPILE, Job, Row
from bench.timing import Run, Timing, interleaved, peak_bytes
from ditfast.hardware import Ceilings
from ditfast.kernels import BackendError
from ditfast.kernels.peers import PeerError

log = logging.getLogger("bench")


@dataclass(frozen=True)
class Settings:
    """How contests are measured: where, against which limits, how long each; `cache_bytes` of a CPU."""

    device: torch.device
    limits: Ceilings | None = None
    rounds: int = 50
    seconds: float = 2.0
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Contest:
    """One job, and those who do it by the provider's name.

    dtype     as ditfast.hardware.DTYPES has it: it says which GEMM rate is the limit
    entrants  what is timed; tensors had better be made at the first call, since a contest may be skipped
    check     of a provider: None where it does the job, else what is wrong with its results. It is called first, and
              may raise PeerError or BackendError where the provider cannot run here
    bytes     that must move, flops: of matrix products; None where that is not known, and then there is no limit
    extra     of every row
    details   of a provider and its Timing: more for its row, asked for when the timing is over
    baseline  the provider that ratio_to_compile is to
    wall      time by the host's clock, for runs that wait for the device at their end: whole steps, in which what
              Python needs is part of the job
    """

    suite: str
    name: str
    dtype: str
    shape: str
    entrants: Mapping[str, Run]
    check: Callable[[str], str | None]
    bytes: int | None = None
    flops: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    details: Callable[[str, Timing], Mapping[str, Any]] = lambda provider, timing: {}
    baseline: str = COMPILE
    wall: bool = False

    @property
    def job(self) -> Job:
        """What the rows have in common."""
        return self.suite, self.name, self.dtype, self.shape

    def measure(self, settings: Settings) -> list[Row]:
        """A Row of every provider, those that were not timed with the reason in `extra`."""
        reasons = {provider: why for provider in self.entrants if (why := self.admit(provider))}
        fit = {provider: run for provider, run in self.entrants.items() if provider not in reasons}
        peaks = {}
        for provider in list(fit):
            try:
                fit[provider]()  # Memory that only a first run takes, as for compiling, is not the job's.
                peaks[provider] = peak_bytes(fit[provider], settings.device)
            except Exception as error:
                reasons[provider] = {"failed": told(error)}
                del fit[provider]
        clocked = "cpu" if self.wall else settings.device
        timings = interleaved(fit, clocked, rounds=settings.rounds, seconds=settings.seconds)
        baseline = timings.get(self.baseline)
        rows = []
        for provider in self.entrants:
            if provider in reasons:
                rows.append(Row(self.suite, self.name, provider, self.dtype, self.shape, extra=reasons[provider]))
            else:
                rows.append(self.row(provider, timings[provider], peaks[provider], baseline, settings))
        return rows

    def admit(self, provider: str) -> dict[str, str] | None:
        """None for a provider that does the job, else {"absent" or "refused" or "failed": why}."""
        return admit(self.check, provider)

    def row(self, provider: str, timing: Timing, peak: int | None, baseline: Timing | None, settings: Settings) -> Row:
        """The row of a provider that was timed."""
        least = least_ms(self.bytes, self.flops, self.dtype, settings)
        work = {key: value for key, value in (("bytes", self.bytes), ("flops", self.flops)) if value is not None}
        return Row(
            *(self.suite, self.name, provider, self.dtype, self.shape),
            *(timing.ms, timing.p20, timing.p80),
            ratio_to_compile=baseline.ms / timing.ms if baseline else None,
            percent_of_limit=100 * least / timing.ms if least is not None else None,
            peak_bytes=peak,
            extra={**work, **self.extra, "samples": len(timing.samples), **self.details(provider, timing)},
        )


def admit(check: Callable[[str], str | None], provider: str) -> dict[str, str] | None:
    """`Contest.admit` by such a `check`."""
    try:
        wrong = check(provider)
    except (PeerError, BackendError) as error:
        return {"absent": str(error)}
    except Exception as error:
        return {"failed": told(error)}
    return {"refused": wrong} if wrong else None


def least_ms(bytes: int | None, flops: int | None, dtype: str, settings: Settings) -> float | None:
    """The least milliseconds that the measured limits allow for so much work; None where they do not say.

    Of bytes that a CPU's cache may hold, and in which they still are from the last run, memory is no limit.
    """
    limits = settings.limits
    if limits is None or limits.source != "measured" or (bytes is None and not flops):
        return None
    if flops and dtype not in limits.gemm_tflops:
        return None
    moving = (bytes or 0) / limits.copy_gbps / 1e6
    computing = flops / limits.gemm_tflops[dtype] / 1e9 if flops else 0.0
    cached = settings.device.type == "cpu" and (bytes or 0) < 2 * (settings.cache_bytes or 0)
    if cached and computing < moving:
        return None
    return max(moving, computing)


def told(error: Exception) -> str:
    """The error in one line that a table can hold."""
    log.debug("failed", exc_info=error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
