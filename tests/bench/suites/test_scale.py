"""The suite `scale`: two processes, their efficiency, and gradients that were not reduced are refused."""

from dataclasses import replace

import pytest
import torch

from bench.contest import Settings
from bench.suites import SMALL, Options
from bench.suites.scale import Ranks, contests
from bench.training import TINY, trainer_for
from ditfast.distributed import World

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, rounds=3, seconds=0.5)
(JOB,) = contests(Options(CPU, SMALL))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_row_of_two_processes():
    (row,) = JOB.measure(SETTINGS)
    extra = row.extra
    assert row.why_not is None and row.ms > 0 and extra["ranks"] == 2
    assert extra["images_per_s"] == pytest.approx(1e3 * 2 * JOB.batch / row.ms)
    assert extra["efficiency"] > 0 and 0 <= extra["communication_share"] < 1 and extra["reduction_ms"] > 0
    assert extra["gradient_bytes"] > 4 * 100_000 and extra["samples"] >= 3


def test_more_ranks_than_gpus_are_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (row,) = replace(JOB, device=torch.device("cuda")).measure(SETTINGS)
    assert row.ms is None and row.extra["absent"] == "2 ranks need as many GPUs, there are 1"


def test_gradients_that_were_not_reduced_are_refused():
    alone = World(0, 1, CPU)
    with trainer_for(TINY, 4, "fp32", alone) as one, trainer_for(TINY, 2, "fp32", alone) as other:
        # The second process's gradients are missing in what this one has.
        wrong = Ranks(World(0, 2, CPU), one, other, 2).wrong()
        assert "gradients of 2 ranks have the norm" in wrong
        assert Ranks(alone, one, other, 2).wrong() is None


@pytest.mark.full
def test_processes_that_fail_say_why():
    with pytest.raises(RuntimeError, match=r"2 ranks ended with 1: (?s:.*)Did you mean 'DiT-XL/2'"):
        replace(JOB, model="DiT-XL2").measure(SETTINGS)
