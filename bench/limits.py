"""The machine's limits, measured: bandwidth of a copy and rate of a GEMM per dtype; `python -m bench limits`."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.machine import cache_bytes, device_name
from bench.timing import interleaved
from ditfast import hardware
from ditfast.hardware import Ceilings

# Several times the caches, and small enough for any GPU.
COPY_BYTES = 2**30
# A GEMM of 8192^3 is the customary measure on a GPU; on a CPU it is the largest up to 1024^3 that takes SECONDS.
GEMM_SIZE, CPU_GEMM_SIZE = 8192, 1024
SECONDS = 0.2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def of(device: torch.device, path: Path | None = None) -> Ceilings:
    """The measured limits of a device: in ditfast.hardware's file, else measured now and kept."""
    name = limits_name(device)
    found = hardware.measured(name, path)
    if found is None or found.machine != name:
        found = measure(device)
        hardware.save_measured(found, path)
    return found


def measure(device: torch.device, copy_bytes: int | None = None, size: int | None = None) -> Ceilings:
    """Measure: copy of `copy_bytes`, GEMM of `size`^3 in each dtype, of random numbers; the fastest of the samples.

    A limit is what the machine can do, so here the fastest counts, where elsewhere it is the median.
    """
    on_gpu = device.type == "cuda"
    if copy_bytes is None:
        copy_bytes = COPY_BYTES if on_gpu else max(2**26, 4 * (cache_bytes() or 0))
    size = size or (GEMM_SIZE if on_gpu else CPU_GEMM_SIZE)
    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gbps = 2 * copy_bytes / 1e9 / _fastest(lambda: target.copy_(source), device)
    rates = {}
    for name, dtype in DTYPES.items():
        if name != "tf32" or (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
            rates[name] = _gemm_tflops(dtype, size, device, tf32=name == "tf32")
    return Ceilings(gbps, rates, "measured", limits_name(device), torch.__version__)


def limits_name(device: torch.device) -> str:
    """The device by name, a CPU with the threads that it is used by, on which its limits depend."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def as_dict(found: Ceilings | None) -> dict[str, Any] | None:
    """As results files have it."""
    return None if found is None else asdict(found)


def _gemm_tflops(dtype: torch.dtype, size: int, device: torch.device, tf32: bool) -> float:
    while device.type == "cpu" and size > 128 and _gemm_seconds(dtype, size // 4, device, rounds=3) > SECONDS / 64:
        size //= 2
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        return 2 * size**3 / 1e12 / _gemm_seconds(dtype, size, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _gemm_seconds(dtype: torch.dtype, size: int, device: torch.device, rounds: int = 30) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _fastest(lambda: a @ b, device, rounds)


def _fastest(run: Any, device: torch.device, rounds: int = 30) -> float:
    """Seconds."""
    return min(interleaved({"": run}, device, rounds=rounds, seconds=0.5)[""].samples) / 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the limits anew, keeps and prints them."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    parser.add_argument("--device", help="cuda, cuda:1, cpu; a GPU where there is one")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = measure(device)
    print(f"{found.machine}: copy {found.copy_gbps:.1f} GB/s; kept in {hardware.save_measured(found)}")
    for name, rate in found.gemm_tflops.items():
        print(f"  GEMM {name} {rate:.3f} TFLOP/s")
    return 0
