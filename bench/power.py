"""Power, clocks, memory and utilization of an NVIDIA GPU by NVML, sampled beside a measurement.

Energy is the difference of the GPU's own counter where it has one, otherwise mean power times time. NVML counts the
whole board: other processes on it are measured too.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

INTERVAL = 0.05  # seconds between readings; NVML's own are renewed about every 0.1
READINGS: dict[str, Callable[[Any, Any], float]] = {
    "watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "board_memory_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "gpu_busy_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_busy_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory,
}


@dataclass(frozen=True)
class Gpu:
    """NVML's module and its handle of one GPU."""

    nvml: Any
    handle: Any

    def read(self, name: str) -> float | None:
        """One of READINGS now; None where this GPU has none."""
        try:
            return READINGS[name](self.nvml, self.handle)
        except self.nvml.NVMLError:
            return None

    def joules(self) -> float | None:
        """The energy counter; None where this GPU has none."""
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except self.nvml.NVMLError:
            return None


def find_gpu(device: torch.device) -> Gpu | str:
    """The GPU behind a device of PyTorch, or why NVML has none."""
    try:
        import pynvml
    except ImportError as error:
        return f"nvidia-ml-py is missing ({error}); pip install 'ditfast[bench]'"
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return "no NVIDIA driver"
    except pynvml.NVMLError as error:
        return f"NVML does not start: {error}"
    if device.type != "cuda":
        return f"measured on {device.type}, not on an NVIDIA GPU"
    # By identity: NVML's numbering knows nothing of CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError as error:
        return f"NVML does not know {uuid}: {error}"


class Sampler:
    """Samples a GPU in a thread while its `with` block runs; `figures` afterwards.

    `absent` says why there is nothing to sample, and is None where there is.
    """

    def __init__(self, device: torch.device, interval: float = INTERVAL):
        found = find_gpu(device)
        self.gpu = found if isinstance(found, Gpu) else None
        self.absent = None if isinstance(found, Gpu) else found
        self.device, self.interval = device, interval
        self.samples: dict[str, list[float]] = {name: [] for name in READINGS}
        self.joules: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> "Sampler":
        if self.gpu is not None:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(self.gpu,), daemon=True)
            torch.cuda.synchronize(self.device)
            self._joules, self._start = self.gpu.joules(), time.perf_counter()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.gpu is None:
            return
        torch.cuda.synchronize(self.device)
        self.seconds, after = time.perf_counter() - self._start, self.gpu.joules()
        self._stop.set()
        self._thread.join()
        if self._joules is not None and after is not None:
            self.joules = after - self._joules
        elif self.samples["watts"]:
            self.joules = fmean(self.samples["watts"]) * self.seconds

    def _watch(self, gpu: Gpu) -> None:
        while True:
            for name, values in self.samples.items():
                if (value := gpu.read(name)) is not None:
                    values.append(value)
            if self._stop.wait(self.interval):
                return

    def figures(self, images: int) -> dict[str, float | str | None]:
        """Mean of each reading and joules per image, of so many images computed in the block; nulls where absent.

        A row's `extra`; where nothing was sampled, `power` says why.
        """
        means: dict[str, float | str | None] = {name: fmean(v) if v else None for name, v in self.samples.items()}
        means["joules_per_image"] = self.joules / images if self.joules is not None else None
        return means if self.absent is None else means | {"power": self.absent}
