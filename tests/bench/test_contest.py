"""The gate of a contest: what is wrong, missing or broken is not timed; and what rows are made of what is."""

import pytest
import torch

from bench.contest import Contest, Settings, least_ms
from bench.timing import Prepared
from ditfast.hardware import Ceilings
from ditfast.kernels import BackendError
from ditfast.kernels.peers import PeerError

CPU = torch.device("cpu")
LIMITS = Ceilings(10.0, {"fp32": 0.5, "bf16": 1.0}, "measured", "a machine", "2.13")
SETTINGS = Settings(CPU, LIMITS, rounds=3, seconds=0.0)


def must_not_run():
    raise AssertionError("it was refused")


def contest(entrants, check=lambda provider: None, **rest):
    return Contest("suite", "job", "fp32", "B 2", entrants, check, **rest)


def measured(*args, **kwargs):
    return {row.provider: row for row in contest(*args, **kwargs).measure(SETTINGS)}


def test_what_is_red_is_refused_and_not_run():
    entrants = {"ditfast": must_not_run, "eager": lambda: None}
    rows = measured(entrants, lambda provider: "off by 1 %" if provider == "ditfast" else None)
    assert rows["ditfast"].ms is None and rows["ditfast"].extra == {"refused": "off by 1 %"}
    assert rows["eager"].ms is not None


@pytest.mark.parametrize("error", (PeerError("liger is missing"), BackendError("liger is missing")))
def test_what_is_missing_is_absent_and_not_run(error):
    def check(provider):
        raise error

    assert measured({"liger": must_not_run}, check)["liger"].extra == {"absent": "liger is missing"}


def test_a_check_that_raises_is_a_failure():
    def check(provider):
        raise RuntimeError("no driver\nand a trace")

    assert measured({"liger": must_not_run}, check)["liger"].extra == {"failed": "RuntimeError: no driver"}


def test_a_run_that_raises_does_not_keep_others_from_theirs():
    def broken():
        raise MemoryError("CUDA out of memory")

    rows = measured({"broken": broken, "eager": lambda: None})
    assert rows["broken"].why_not == "failed: MemoryError: CUDA out of memory"
    assert rows["eager"].ms is not None


def test_a_row_has_what_was_measured():
    x = torch.zeros(1000, 1000)
    entrants = {"ditfast": lambda: x + 1, "compile": lambda: (x + 1) + 1}
    details = lambda provider, timing: {"images_per_s": 8 / timing.ms}  # noqa: E731
    rows = measured(entrants, bytes=8_000_000, extra={"pass": "fwd"}, details=details)
    row, compiled = rows["ditfast"], rows["compile"]
    assert row.job == ("suite", "job", "fp32", "B 2")
    assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
    assert row.ratio_to_compile == compiled.ms / row.ms and compiled.ratio_to_compile == 1
    assert row.percent_of_limit == pytest.approx(100 * 0.8 / row.ms)
    assert row.peak_bytes == pytest.approx(4e6, rel=0.01)
    assert row.extra == {"bytes": 8_000_000, "pass": "fwd", "samples": 3, "images_per_s": 8 / row.ms}


def test_without_the_baseline_there_is_no_ratio():
    assert measured({"ditfast": lambda: None})["ditfast"].ratio_to_compile is None
    rows = measured({"ditfast": lambda: None, "best sdpa": lambda: None}, baseline="best sdpa")
    assert rows["best sdpa"].ratio_to_compile == 1


def test_a_prepared_run_is_prepared_for_its_memory_too():
    leaf = torch.ones(10, requires_grad=True)
    backward = Prepared(lambda: (leaf * leaf).sum(), lambda loss: torch.autograd.grad(loss, leaf))
    assert measured({"ditfast": backward})["ditfast"].ms is not None


@pytest.mark.parametrize(
    ("bytes", "flops", "dtype", "ms"),
    (
        (10_000_000, None, "fp32", 1.0),  # 10 MB at 10 GB/s
        (10_000_000, 0, "tf32", 1.0),
        (10_000_000, 2_000_000_000, "fp32", 4.0),  # 2 GFLOP at 0.5 TFLOP/s
        (10_000_000, 2_000_000_000, "bf16", 2.0),
        (None, 2_000_000_000, "bf16", 2.0),
        (10_000_000, 2_000_000_000, "fp16", None),  # whose rate was not measured
        (None, None, "fp32", None),
    ),
)
def test_the_least_time_is_of_what_bounds_it(bytes, flops, dtype, ms):
    assert least_ms(bytes, flops, dtype, SETTINGS) == (ms if ms is None else pytest.approx(ms))


def test_memory_is_no_limit_of_what_the_cache_holds():
    cached = Settings(CPU, LIMITS, cache_bytes=32_000_000)
    assert least_ms(10_000_000, None, "fp32", cached) is None
    assert least_ms(10_000_000, 20_000_000_000, "fp32", cached) == pytest.approx(40)
    assert least_ms(100_000_000, None, "fp32", cached) == pytest.approx(10)
    assert least_ms(10_000_000, None, "fp32", Settings(torch.device("cuda"), LIMITS, cache_bytes=32_000_000)) == 1


def test_a_datasheet_is_no_limit():
    datasheet = Ceilings(10.0, {"fp32": 0.5}, "datasheet", "H200")
    assert least_ms(10_000_000, None, "fp32", Settings(CPU, datasheet)) is None
    assert least_ms(10_000_000, None, "fp32", Settings(CPU, None)) is None
