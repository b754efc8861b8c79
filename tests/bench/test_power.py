"""The NVML sampler: against a stand-in with a clock of its own, and on a machine without a driver."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import power

CUDA = torch.device("cuda", 0)


class Stand(ModuleType):
    """pynvml of a GPU that draws 300 W and 500 W in turn, and knows its energy if it has a counter."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    def __init__(self, start: type[Exception] | None = None, counter: bool = True):
        super().__init__("pynvml")
        self.start, self.counter, self.millijoules, self.readings = start, counter, 5_000_000, 0

    def nvmlInit(self):
        if self.start is not None:
            raise self.start

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-known":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle):
        self.readings += 1
        return 300_000 if self.readings % 2 else 500_000

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[kind]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=7 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise self.NVMLError("Not Supported")
        self.millijoules += 40_000
        return self.millijoules


@pytest.fixture
def stand(monkeypatch):
    """stand(...) puts a stand-in in pynvml's place, for a CUDA device of the given identity."""

    def install(uuid: str = "known", **options) -> Stand:
        made = Stand(**options)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        return made

    return install


def sampled(seconds: float = 0.05) -> power.Sampler:
    with power.Sampler(CUDA, interval=0.001) as sampler:
        time.sleep(seconds)
    return sampler


def test_energy_is_the_counters_and_readings_are_means(stand):
    stand()
    figures = sampled().figures(images=8)
    assert figures["joules_per_image"] == 40 / 8
    assert 380 < figures["watts"] < 420
    assert (figures["sm_mhz"], figures["memory_mhz"], figures["board_memory_bytes"]) == (1980, 3201, 7 * 2**30)
    assert figures["gpu_busy_percent"] is None and figures["memory_busy_percent"] is None
    assert "power" not in figures


def test_without_a_counter_energy_is_power_by_time(stand):
    stand(counter=False)
    sampler = sampled()
    assert sampler.joules == pytest.approx(sampler.figures(1)["watts"] * sampler.seconds)
    assert 0.05 <= sampler.seconds < 5


def test_the_thread_ends_with_the_block(stand):
    made = stand()
    sampled()
    readings = made.readings
    time.sleep(0.02)
    assert made.readings == readings > 1


@pytest.mark.parametrize("error", [Stand.NVMLError_LibraryNotFound, Stand.NVMLError_DriverNotLoaded])
def test_without_a_driver_the_figures_are_null_and_say_why(stand, error):
    stand(start=error)
    figures = sampled(0).figures(images=1)
    assert figures.pop("power") == "no NVIDIA driver"
    assert set(figures) == {*power.READINGS, "joules_per_image"} and set(figures.values()) == {None}


def test_a_gpu_that_nvml_does_not_know_is_named(stand):
    stand(uuid="other")
    assert sampled(0).absent == "NVML does not know GPU-other: Not Found"


def test_a_run_on_the_cpu_is_not_ascribed_to_a_gpu(stand):
    stand()
    assert power.Sampler(torch.device("cpu")).absent == "measured on cpu, not on an NVIDIA GPU"


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'ditfast[bench]'" in power.Sampler(CUDA).absent


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_real_nvml_without_a_driver():
    pytest.importorskip("pynvml")
    assert power.Sampler(torch.device("cpu")).absent == "no NVIDIA driver"
