"""The suites under pytest-benchmark: a test of every provider in every contest, grouped by contest.

    pytest bench/test_suites.py --small --benchmark-json=now.json --benchmark-histogram=now
    pytest bench/test_suites.py --small --benchmark-compare --benchmark-autosave

pytest-benchmark times each provider by itself, by the host's clock until the device is done; the rows that it keeps as
extra_info hold these times. For device time, and providers in turn, there is `python -m bench`.
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
from bench.suites import SUITES, Options, scale_of
from bench.timing import Prepared, Timing, peak_bytes, ready, repeats


def pytest_generate_tests(metafunc: Any) -> None:
    """The providers of the contests, the baseline first: ratio_to_compile is to what was timed before."""
    found = list(_contests(metafunc.config))
    metafunc.parametrize(
        ("contest", "provider"),
        [
            pytest.param(contest, provider, id=f"{contest.name}, {contest.dtype}, {contest.shape}-{provider}")
            for contest in found
            for provider in sorted(contest.entrants, key=lambda provider: provider != contest.baseline)
        ],
    )


def _device(config: Any) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def _contests(config: Any) -> Iterator[Contest]:
    device = _device(config)
    options = Options(device, scale_of(device, config.getoption("--small")))
    for suite in config.getoption("--suite") or ["ops"]:
        for piece in importlib.import_module(SUITES[suite]).contests(options):
            if isinstance(piece, Contest):
                yield piece


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
