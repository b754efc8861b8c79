"""`ditfast doctor`: versions, devices, the backend that each op takes here, what is missing and how to get it."""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ditfast import __version__, kernels
from ditfast.config import PRECISIONS, ConfigError, checked_precision
from ditfast.hardware import find_gpu
from ditfast.kernels.attention import libraries
from ditfast.plan import plan_memory, published_model, state
from ditfast.presets import PUBLISHED

# What bench/gpu.sh writes; only a source tree has it.
LEDGER = Path(__file__).parents[1] / "bench" / "results" / "chip.json"


@dataclass(frozen=True)
class Package:
    """An optional or required package: its import name, what it is for, how to get it."""

    distribution: str
    module: str
    purpose: str
    install: str


PACKAGES = (
    Package("triton", "triton", "GPU kernels, and their interpreter on CPUs", "pip install triton"),
    Package("scikit-learn", "sklearn", "the digits and the demo's classifier", "pip install scikit-learn"),
    Package("tensorboard", "tensorboard", "training curves", "pip install tensorboard"),
    Package("matplotlib", "matplotlib", "the demo's loss curve", "pip install matplotlib"),
    Package("diffusers", "diffusers", "VAE, pipelines", "pip install diffusers"),
    Package("torchdiffeq", "torchdiffeq", "adaptive ODE samplers", "pip install torchdiffeq"),
    Package("nvidia-ml-py", "pynvml", "clocks and power in benches", "pip install nvidia-ml-py"),
)


def package_state(package: Package) -> tuple[str, str]:
    """(version or "missing", what to do about it or "")."""
    if importlib.util.find_spec(package.module) is None:
        return "missing", package.install
    try:
        return importlib.metadata.version(package.distribution), ""
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version", ""


def devices() -> list[tuple[torch.device, str]]:
    """Every device and a line about it."""
    found = [(torch.device("cpu"), f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        peak = getattr(find_gpu(p.name), "bf16", None)
        line = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"
        found.append((torch.device("cuda", i), line + (f", {peak} TFLOP/s bf16 by datasheet" if peak else "")))
    return found


def library_state(name: str, device: torch.device) -> str:
    """Whether attention can run by this library on a device: its version, or what is wrong."""
    return libraries.refusal(name, device, torch.bfloat16, None) or f"usable, {libraries.version_of(name)}"


def library_proof(name: str) -> str:
    """On which chip bench/gpu.sh saw attention pass by this library; "unproven" where the ledger does not say."""
    entries = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    needed = [f"{op}/{name}" for op in ("attention", "attention_qkvpacked")]
    if not entries.keys() >= set(needed):
        return "unproven"
    return ", ".join(dict.fromkeys(f"{entries[key]['version']} passed on {entries[key]['gpu']}" for key in needed))


def op_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend an op takes under backend="auto", or why it takes none."""
    try:
        return kernels.backend_of(name, device, dtype)
    except kernels.BackendError as error:
        return str(error)


def doctor() -> int:
    """Prints the report; 0 if every op can run on every device, 1 otherwise."""
    console = Console()
    cuda = torch.version.cuda or "none"
    console.print(
        f"ditfast {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {cuda}"
    )

    table = Table("package", "version", "for", "to get it", title="Packages", title_justify="left")
    for package in PACKAGES:
        version, remedy = package_state(package)
        table.add_row(package.distribution, version, package.purpose, remedy)
    console.print(table)

    present = devices()
    table = Table("device", "", title="Devices", title_justify="left")
    for device, line in present:
        table.add_row(str(device), line)
    console.print(table)
    if not torch.cuda.is_available():
        console.print(
            "No CUDA device: ops run on their PyTorch reference; Triton kernels in its interpreter, for tests."
        )

    table = Table(
        "op", *(str(device) for device, _ in present), title="Backend of each op (bf16)", title_justify="left"
    )
    able = True
    for spec in kernels.OPS:
        taken = [op_backend(spec.name, device, torch.bfloat16) for device, _ in present]
        able &= all(backend in spec.op.backends for backend in taken)
        table.add_row(spec.name, *taken)
    console.print(table)

    device = present[-1][0]
    table = Table("library", f"on {device}", "on a chip", title="Attention by other libraries", title_justify="left")
    for name in libraries.LIBRARIES:
        table.add_row(name, library_state(name, device), library_proof(name))
    console.print(table)
    return 0 if able else 1


def memory(name: str, batch_size: int = 256, image_size: int | None = None, precision: str = "bf16") -> None:
    """Prints what training `name`, a preset such as DiT-XL/2@512, takes of a GPU's memory under every recompute policy.

    batch_size is that of one GPU, image_size in pixels, of which the model sees latents of an eighth, LightningDiT
    of a sixteenth; by default 256, or what the name ends in.
    ConfigError for an unknown model or precision and for impossible sizes.
    """
    model = published_model(name, image_size)
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be positive, got {batch_size}")
    held = PRECISIONS[checked_precision(precision)]
    network, _, pixels = name.partition("@")
    size = image_size or (int(pixels or 256) if network in PUBLISHED else model.x_embedder.img_size[0])
    alive, tokens = state(model, held).total, batch_size * model.x_embedder.num_patches
    rows = plan_memory(model, held, batch_size)
    unit, factor = ("GB", 1e9) if alive + max(row.activations + row.working for row in rows) >= 1e9 else ("MB", 1e6)
    copies = "" if held.compute is held.params else " and, at most, autocast's copies"
    console = Console(soft_wrap=True)
    console.print(
        f"Memory of training {network} at {size} pixels, batch {batch_size} ({tokens} tokens), {precision}: "
        f"{alive / factor:.1f} {unit} of weights, gradients, optimizer and EMA{copies}, and by recompute policy"
    )
    table = Table("policy", "bytes a token and layer", f"activations, {unit}", f"all, with a block at work, {unit}")
    for row in rows:
        total = (alive + row.activations + row.working) / factor
        table.add_row(row.policy, f"{row.per_token:,.0f}", f"{row.activations / factor:.1f}", f"{total:.1f}")
    console.print(table)
    console.print("Computed from shapes, not measured. With kernels, as on a GPU; in PyTorch's ops `none` keeps more.")
