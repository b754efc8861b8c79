"""What a measurement ran on: device, driver, versions, clocks, commit."""

import hashlib
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# What makes two machine objects the same machine running the same code, so that rows of both may stand in one file.
IDENTITY = ("device", "count", "driver", "threads", "torch", "cuda", "triton", "source")


def machine(device: str | torch.device | None = None) -> dict[str, Any]:
    """The machine object of a results file, for a device ("cuda" where there is a GPU by default, else "cpu").

    device (name), kind ("cuda" or "cpu"), count (GPUs), capability, memory_bytes of the GPU, cpu (name), cores that
    this process may use, threads, cache_bytes (the CPU's last level), driver, clocks (MHz and W by NVML), cuda, torch,
    triton, python, source (hash of the code), commit, date. What cannot be known is null.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    found = nvml(device.index or 0) if on_gpu else {"driver": None, "clocks": None}
    return {
        "device": device_name(device),
        "kind": device.type,
        "count": torch.cuda.device_count() if on_gpu else 0,
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        **found,
        "cuda": torch.version.cuda,
        "source": source(),
        **_software(),
    }


def changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of IDENTITY differs, as text; if nothing does, rows measured on both may stand in one file."""
    return [f"{key} {one.get(key)} and {other.get(key)}" for key in IDENTITY if one.get(key) != other.get(key)]


def machine_line() -> dict[str, Any]:
    """What the ledger notes of each pass on a GPU: commit, date, GPU, versions."""
    return {"gpu": torch.cuda.get_device_name(), **_software()}


def _software() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@cache
def cpu_name() -> str:
    """The CPU's model name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@cache
def cache_bytes() -> int | None:
    """Bytes of the CPU's last-level cache; None where Linux does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def nvml(index: int) -> dict[str, Any]:
    """Driver, clocks (MHz) and power limit (W) of a GPU now, nulls where NVML cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # No package, no driver, no permission: each has its own class of error.
        return {"driver": None, "clocks": None}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(index))
        driver = pynvml.nvmlSystemGetDriverVersion()
        asked = {
            "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "memory_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        }
        return {"driver": driver, "clocks": {name: _or_none(ask) for name, ask in asked.items()}}
    except pynvml.NVMLError:
        return {"driver": None, "clocks": None}
    finally:
        pynvml.nvmlShutdown()


def _uuid(index: int) -> str:
    """NVML's name of a CUDA device: its numbers may differ, as CUDA_VISIBLE_DEVICES renumbers CUDA's alone."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def _or_none(ask: Any) -> Any:
    """What NVML says, None where this GPU does not."""
    import pynvml

    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _triton_version() -> str | None:
    from ditfast.kernels import _triton

    return _triton.VERSION if _triton.INSTALLED else None


@cache
def source() -> str:
    """The first digits of a sha256 over all Python and C++ sources: the same code, whether committed or not."""
    files = sorted(p for room in ("ditfast", "bench", "csrc") for p in (ROOT / room).rglob("*.*") if _is_source(p))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _is_source(path: Path) -> bool:
    return path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")


@cache
def commit() -> str | None:
    """The commit of the tree, with "-dirty" where files differ from it; None outside a git checkout."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return git.stdout.strip() if git.returncode == 0 else None
