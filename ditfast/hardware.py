"""What devices can do: datasheet figures of common GPUs by name, and the ceilings measured on this machine."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditfast.config import ConfigError, Precision, nearest
from ditfast.files import replacing

DTYPES = ("bf16", "fp16", "tf32", "fp32")


@dataclass(frozen=True)
class Gpu:
    """A GPU by its vendor's datasheet.

    words     what its device name must have, in lower case; the entry with the most words in a name is it
    bf16 ...  dense peaks in TFLOP/s with fp32 accumulation: bf16, fp16 and tf32 by tensor cores, fp32 without; None:
              the chip has no such units, or the datasheet no such figure
    gbps      memory bandwidth, GB/s (1e9)
    memory    GB (1e9) as sold; what a process can have is a few percent less
    link      GB/s, each direction, from one GPU to the others of its node: NVLink, else its PCIe slot
    network   GB/s, each direction, from one GPU to other nodes in the vendor's own server (DGX); None: there is none
    bridged   how many GPUs a bridge joins, and GB/s, each direction, between them; None: there is none
    """

    name: str
    words: str
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None
    gbps: float
    memory: float
    link: float
    network: float | None = None
    bridged: tuple[int, float] | None = None

    def link_among(self, gpus: int) -> float:
        """GB/s, each direction, from one of so many neighbouring GPUs of a node to the others."""
        return self.bridged[1] if self.bridged and gpus <= self.bridged[0] else self.link


# NVIDIA's datasheets and, for cards without tensor-core figures there, its architecture white papers. Where they give
# rates with sparsity, half of those; where NVLink is given for both directions together, half of that.
GPUS = (
    Gpu("B200", "b200", 2250, 2250, 1125, 75, 8000, 180, 900, 50),
    Gpu("GH200", "gh200", 989, 989, 494, 67, 4000, 96, 450),
    Gpu("H200", "h200", 989, 989, 494, 67, 4800, 141, 450, 50),
    Gpu("H200 NVL", "h200 nvl", 835, 835, 417, 60, 4800, 141, 64, bridged=(4, 450)),
    Gpu("H100 SXM", "h100", 989, 989, 494, 67, 3350, 80, 450, 50),
    Gpu("H100 PCIe", "h100 pcie", 756, 756, 378, 51, 2000, 80, 64, bridged=(2, 300)),
    Gpu("H100 NVL", "h100 nvl", 835, 835, 417, 60, 3900, 94, 64, bridged=(2, 300)),
    Gpu("H800 SXM", "h800", 989, 989, 494, 67, 3350, 80, 200, 50),
    Gpu("H20", "h20", 148, 148, 74, 44, 4000, 96, 450, 50),
    Gpu("A100 SXM 80GB", "a100", 312, 312, 156, 19.5, 2039, 80, 300, 25),
    Gpu("A100 SXM 40GB", "a100 40gb", 312, 312, 156, 19.5, 1555, 40, 300, 25),
    Gpu("A100 PCIe 80GB", "a100 pcie", 312, 312, 156, 19.5, 1935, 80, 32, bridged=(2, 300)),
    Gpu("A100 PCIe 40GB", "a100 40gb pcie", 312, 312, 156, 19.5, 1555, 40, 32, bridged=(2, 300)),
    Gpu("A800 SXM 80GB", "a800", 312, 312, 156, 19.5, 2039, 80, 200, 25),
    Gpu("A40", "a40", 150, 150, 75, 37.4, 696, 48, 32),
    Gpu("A30", "a30", 165, 165, 82, 10.3, 933, 24, 32),
    Gpu("A10G", "a10g", 70, 70, 35, None, 600, 24, 32),
    Gpu("A10", "a10", 125, 125, 62.5, 31.2, 600, 24, 32),
    Gpu("L40S", "l40s", 362, 362, 183, 91.6, 864, 48, 32),
    Gpu("L40", "l40", 181, 181, 90.5, 90.5, 864, 48, 32),
    Gpu("L4", "l4", 121, 121, 60, 30.3, 300, 24, 32),
    Gpu("V100 SXM", "v100", None, 125, None, 15.7, 900, 32, 150, 12.5),
    Gpu("V100 SXM 16GB", "v100 16gb", None, 125, None, 15.7, 900, 16, 150, 12.5),
    Gpu("V100 PCIe", "v100 pcie", None, 112, None, 14, 900, 32, 16),
    Gpu("V100 PCIe 16GB", "v100 pcie 16gb", None, 112, None, 14, 900, 16, 16),
    Gpu("RTX 5090", "rtx 5090", 209.5, 209.5, 104.8, 104.8, 1792, 32, 64),
    Gpu("RTX 4090", "rtx 4090", 165.2, 165.2, 82.6, 82.6, 1008, 24, 32),
    Gpu("RTX 3090", "rtx 3090", 71, 71, 35.6, 35.6, 936, 24, 32),
    Gpu("RTX 6000 Ada", "rtx 6000 ada", 364, 364, 182, 91.1, 960, 48, 32),
    Gpu("RTX A6000", "rtx a6000", 155, 155, 77.4, 38.7, 768, 48, 32),
)
# A slice of a GPU, and smaller chips of the same number.
OTHER_CHIPS = {"mig", "laptop", "max", "d", "ti"}


def find_gpu(name: str) -> Gpu | None:
    """The datasheet entry of a device name ("NVIDIA H100 80GB HBM3") or of a short one ("h100"), None for others."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [gpu for gpu in GPUS if words | {"rtx"} >= set(gpu.words.split())]
    if not found or words & OTHER_CHIPS:
        return None
    entry = max(found, key=lambda gpu: len(gpu.words.split()))
    # A size in the name is of its memory, but for that of Grace beside a Hopper.
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)} - {"480gb"}
    return entry if sizes <= {f"{entry.memory:g}gb"} else None


def gpu(name: str) -> Gpu:
    """`find_gpu`, but ConfigError, with the nearest name, for one that is not listed."""
    found = find_gpu(name)
    if found is None:
        known = {entry.name.lower(): entry.name for entry in GPUS} | {entry.words: entry.name for entry in GPUS}
        hint = nearest(name.lower(), known) or "; known: " + ", ".join(entry.name for entry in GPUS)
        raise ConfigError(f"no datasheet figures of a GPU {name!r}{hint}")
    return found


def dtype_name(dtype: torch.dtype, tf32: bool = False) -> str:
    """Which of DTYPES a GEMM of this dtype is timed as; ValueError for a dtype that is none."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32" if tf32 else "fp32"}
    if dtype not in names:
        raise ValueError(f"no GEMM rate of {dtype}; there are {', '.join(map(str, names))}")
    return names[dtype]


def rate_name(precision: Precision) -> str:
    """Which of DTYPES the matrix products of a precision policy are timed as."""
    return dtype_name(precision.compute, precision.tf32)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most.

    copy_gbps    of a copy larger than its caches, bytes read and written, GB/s (1e9)
    gemm_tflops  of a large matrix product, by names in DTYPES
    source       "measured", on random data, or "datasheet", which no program reaches
    machine      the device's name
    torch        the PyTorch that measured, "" on a datasheet
    """

    copy_gbps: float
    gemm_tflops: Mapping[str, float]
    source: str
    machine: str
    torch: str = ""

    def __post_init__(self) -> None:
        if self.source not in ("measured", "datasheet"):
            raise ValueError(f"source of ceilings must be measured or datasheet, got {self.source!r}")
        if unknown := self.gemm_tflops.keys() - set(DTYPES):
            raise ValueError(f"gemm_tflops is by {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
        for key, value in {"copy_gbps": self.copy_gbps, **self.gemm_tflops}.items():
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"the ceiling {key} must be a positive number, got {value!r}")


def datasheet(name: str) -> Ceilings:
    """The ceilings of a GPU by its datasheet; ConfigError for one that is not listed."""
    found = gpu(name)
    rates = {dtype: rate for dtype in DTYPES if (rate := getattr(found, dtype)) is not None}
    return Ceilings(found.gbps, rates, "datasheet", found.name)


def cache_path() -> Path:
    """Where ceilings measured on this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditfast" / "ceilings.json"


def measured(name: str, path: Path | None = None, version: str | None = torch.__version__) -> Ceilings | None:
    """The ceilings that `save_measured` put into a file for this device, or for another of the same GPU; else None.

    `version` is the PyTorch that measured, None any, the latest entry then. ConfigError for a file that is not one.
    """
    chip = find_gpu(name)
    matching = [
        each for each in _read(path or cache_path()).values()
        if (each.machine == name or (chip is not None and find_gpu(each.machine) is chip))
        and version in (None, each.torch)
    ]  # fmt: skip
    return matching[-1] if matching else None


def save_measured(ceilings: Ceilings, path: Path | None = None) -> Path:
    """Enters measured ceilings into a file of them, by default this machine's, in place of those of the same device
    and PyTorch; returns the file.
    """
    if ceilings.source != "measured":
        raise ValueError(f"only measured ceilings are kept, got those of {ceilings.machine} by {ceilings.source}")
    path = path or cache_path()
    key = f"{ceilings.machine}, torch {ceilings.torch}"
    entries = {k: v for k, v in _read(path).items() if k != key} | {key: ceilings}
    with replacing(path) as file:
        file.write((json.dumps({k: asdict(v) for k, v in entries.items()}, indent=1) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Ceilings]:
    if not path.exists():
        return {}
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        return {key: Ceilings(**entry) for key, entry in tree.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of measured ceilings ({error}); delete it, and measure again") from error
