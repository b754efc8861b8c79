"""The timer, by sleeps of known length and a clock of its own; the memory of runs, by tensors of known size."""

import time

import pytest
import torch

from bench import timing
from bench.timing import Prepared, Timing, interleaved, peak_bytes

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def run(self, seconds):
        def run():
            self.now += seconds

        return run


def test_a_sleep_takes_its_length():
    timings = interleaved({"short": lambda: time.sleep(5e-3), "long": lambda: time.sleep(20e-3)}, CPU, rounds=5)
    assert 5 <= timings["short"].ms < timings["long"].ms and timings["long"].ms >= 20
    assert min(timings["long"].samples) == pytest.approx(20, rel=0.5)


def test_what_is_prepared_is_not_timed():
    run = Prepared(lambda: time.sleep(30e-3) or 5e-3, time.sleep)
    assert 5 <= min(interleaved({"": run}, CPU, rounds=3)[""].samples) < 20


def test_what_is_prepared_is_made_for_each_time():
    used = []
    interleaved({"": Prepared(object, used.append)}, CPU, rounds=4, seconds=60)
    assert len(used) == len(set(map(id, used))) == 6  # two to warm up


def test_runs_take_turns_and_each_is_first_once():
    clock, order = Clock(), []

    def run(name):
        def noted():
            order.append(name)
            clock.now += 1

        return noted

    interleaved({name: run(name) for name in "abc"}, CPU, rounds=3, seconds=1e9, clock=clock)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"


def test_a_short_run_is_repeated_within_a_sample():
    clock = Clock()
    calls = []
    run = clock.run(1e-5)
    timing = interleaved({"": lambda: (calls.append(1), run())}, CPU, rounds=3, clock=clock)[""]
    assert timing.ms == pytest.approx(1e-2) and len(timing.samples) == 3 and len(calls) == 2 + 3 * 100


@pytest.mark.parametrize(("seconds", "samples"), ((0.0, 3), (10.0, 5), (1e9, 7)))
def test_time_and_rounds_bound_the_samples(seconds, samples):
    clock = Clock()
    assert len(interleaved({"": clock.run(2)}, CPU, rounds=7, seconds=seconds, clock=clock)[""].samples) == samples


def test_nothing_to_time():
    assert interleaved({}, CPU) == {}


def test_median_and_percentiles():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.p20, timing.ms, timing.p80) == (2.0, 3.5, 5.0)
    assert Timing((7.0,)).p20 == 7.0


def test_peak_is_the_most_that_lived_at_once():
    def run():
        first = torch.empty(1000, 1000)
        del first
        second, third = torch.empty(500, 1000), torch.empty(250, 1000)
        return second[0, 0] + third[0, 0]

    assert peak_bytes(run, CPU) == pytest.approx(4e6, rel=0.01)


def test_peak_is_above_what_was_there():
    there = torch.zeros(1000, 1000)
    assert peak_bytes(lambda: there.add_(1), CPU) < 1000
    prepared = Prepared(lambda: torch.zeros(1000, 1000), lambda given: given + 1)
    assert peak_bytes(prepared, CPU) == pytest.approx(4e6, rel=0.01)


def test_peak_of_a_backward_counts_the_gradients():
    leaf = torch.ones(1000, 1000, requires_grad=True)
    backward = Prepared(lambda: (leaf * leaf).sum(), lambda loss: torch.autograd.grad(loss, leaf))
    assert 4e6 <= peak_bytes(backward, CPU) <= 13e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_time_is_of_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    timings = interleaved({"once": lambda: x @ x, "twice": lambda: (x @ x, x @ x)}, "cuda", rounds=20)
    assert timings["twice"].ms == pytest.approx(2 * timings["once"].ms, rel=0.2)


def test_on_a_gpu_the_host_is_hidden_and_what_is_prepared_is_not_timed(monkeypatch):
    calls = []

    class Timer:
        def __init__(self, device):
            assert device == torch.device("cuda")

        def host_seconds(self, run):
            run()
            return 0.25

        def __call__(self, run, hide):
            calls.append("begin")
            run()
            assert hide == 0.25
            return 7.0

    monkeypatch.setattr(timing, "DeviceTimer", Timer)
    run = Prepared(lambda: calls.append("prepare"), lambda given: calls.append("run"))
    assert interleaved({"": run}, "cuda", rounds=3)[""].samples == (7.0, 7.0, 7.0)
    assert calls == 2 * ["prepare", "run"] + 3 * ["prepare", "begin", "run"]
