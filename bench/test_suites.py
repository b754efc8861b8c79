"""The suites under pytest-benchmark: a test of every provider of an op, grouped by contest, and of every larger job.

    pytest bench/test_suites.py --small --benchmark-json=now.json --benchmark-histogram=now
    pytest bench/test_suites.py --suite model --small --benchmark-compare --benchmark-autosave

Of an op pytest-benchmark times each provider by itself, by the host's clock until the device is done; the row that it
keeps as extra_info holds these times. For device time, and providers in turn, there is `python -m bench`. A larger job
is measured as there, all its rows are kept, and pytest-benchmark is given the percentiles of ditfast's, or, where rows
have no time, such as those of memory, how long they took to measure.
"""

import importlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import limits
from bench.contest import Contest, Settings
from bench.machine import cache_bytes
from bench.rows import DITFAST, Job
from bench.runner import failures
from bench.suites import SUITES, Options, Piece, scale_of
from bench.timing import Prepared, Timing, peak_bytes, ready, repeats


class Replay:
    """A timer for pytest-benchmark that gives out durations which were measured before, in seconds."""

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.now, self.begun = 0.0, False

    def __call__(self) -> float:
        """The time at the begin of a round, then at its end."""
        if self.begun:
            self.now += self.durations.pop(0)
        self.begun = not self.begun
        return self.now


def pytest_generate_tests(metafunc: Any) -> None:
    """The providers of contests, the baseline first: ratio_to_compile is to what was timed before. And other pieces."""
    pieces = list(_pieces(metafunc.config))
    if "contest" in metafunc.fixturenames:
        contests = [piece for piece in pieces if isinstance(piece, Contest)]
        found = [
            pytest.param(contest, provider, id=f"{contest.name}, {contest.dtype}, {contest.shape}-{provider}")
            for contest in contests
            for provider in sorted(contest.entrants, key=lambda provider: provider != contest.baseline)
        ]
        metafunc.parametrize(("contest", "provider"), found)
    else:
        others = [(piece, Replay()) for piece in pieces if not isinstance(piece, Contest)]
        found = [
            pytest.param(piece, replay, id=", ".join(piece.job), marks=pytest.mark.benchmark(timer=replay))
            for piece, replay in others
        ]
        metafunc.parametrize(("piece", "replay"), found)


def _device(config: Any) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pieces(config: Any) -> Iterator[Piece]:
    device = _device(config)
    options = Options(device, scale_of(device, config.getoption("--small")))
    for suite in config.getoption("--suite") or ["ops"]:
        yield from importlib.import_module(SUITES[suite]).contests(options)


@pytest.fixture(scope="session")
def settings(request: Any) -> Settings:
    """As `python -m bench` has them."""
    device = _device(request.config)
    scale = scale_of(device, request.config.getoption("--small"))
    return Settings(device, limits.of(device), scale.rounds, scale.seconds, cache_bytes())


@pytest.fixture(scope="session")
def baselines() -> dict[Job, Timing]:
    """The Timing of each contest's baseline."""
    return {}


def test_contest(
    contest: Contest, provider: str, settings: Settings, baselines: dict[Job, Timing], benchmark: Any
) -> None:
    """Times a provider that does the job; ditfast fails where it does not, others are skipped."""
    benchmark.group = " ".join(contest.job)
    if why := contest.admit(provider):
        told = "; ".join(f"{provider} is {key}: {reason}" for key, reason in why.items())
        (pytest.fail if provider == DITFAST and "absent" not in why else pytest.skip)(told)
    run = contest.entrants[provider]
    on_gpu = settings.device.type == "cuda"

    def body(*given: Any) -> None:
        run.run(*given) if isinstance(run, Prepared) else run()
        if on_gpu:
            torch.cuda.synchronize(settings.device)

    run()
    start = time.perf_counter()
    ready(run)()
    iterations = 1 if on_gpu else repeats(run, time.perf_counter() - start)

    def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((run.prepare(),) if isinstance(run, Prepared) else ()), {}

    setup = prepared if isinstance(run, Prepared) else None  # with one, iterations have to be 1
    benchmark.pedantic(body, setup=setup, rounds=settings.rounds, iterations=iterations)
    if benchmark.stats is not None:  # None under --benchmark-disable
        timing = Timing(tuple(1e3 * seconds for seconds in benchmark.stats.stats.data))
        if provider == contest.baseline:
            baselines[contest.job] = timing
        row = contest.row(provider, timing, peak_bytes(run, settings.device), baselines.get(contest.job), settings)
        benchmark.extra_info.update(asdict(row))


def test_piece(piece: Piece, replay: Replay, settings: Settings, benchmark: Any) -> None:
    """Measures what is no contest of single runs; fails where ditfast does."""
    start = time.perf_counter()
    rows = piece.measure(settings)
    took = time.perf_counter() - start
    if failed := failures(rows):
        pytest.fail("; ".join(f"{row.provider} {row.why_not}" for row in failed))
    own = next((row for row in rows if row.provider == DITFAST), rows[0])
    if own.why_not:
        pytest.skip(own.why_not)
    times = [ms / 1e3 for ms in (own.ms_p20, own.ms, own.ms_p80) if ms is not None]
    replay.durations = times if len(times) == 3 else [took]
    benchmark.group = f"suite {own.suite}"
    benchmark.pedantic(lambda: None, rounds=len(replay.durations))
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
