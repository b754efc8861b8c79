"""Attention by other people's kernels: an adapter for each library, and why it cannot run where it cannot.

Adapters take q (B, Tq, H, head_dim), k and v (B, Tk, H_kv, head_dim) and a scale, and are differentiable. No library
is imported before it is asked for: an install can be there and broken, or built for another PyTorch, so the first use
looks for the package, then at its version, then runs it once on a tiny input, and remembers.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .reference import repeated, unpacked

_16_BITS = (torch.bfloat16, torch.float16)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where every row starts at 16 bytes, else a copy that does as far as head_dim allows."""
    # Not data_ptr(), which fake tensors and torch.func do not have; the allocator aligns the storage itself.
    if tensor.storage_offset() * tensor.element_size() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    odd = tensor.stride(-1) != 1 or any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
    return tensor.contiguous() if odd else tensor


def groups_fuse(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's fused kernels take grouped heads, from sm_80 on: FA2 and cuDNN do.

    Anything else wants k and v repeated. On a GPU PyTorch would write the weights to memory, and in 16 bits on a CPU
    it adds up the dk and dv of a group in their dtype, which makes 1.5 times the error with 4 heads.
    """
    return dtype in _16_BITS and head_dim <= 256


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, its own choice of kernel."""
    # Set in a branch: under torch.compile a comparison of dynamic sizes is a symbol, which enable_gqa may not be.
    grouped = False
    if q.shape[2] != k.shape[2]:
        if q.is_cuda and groups_fuse(q.dtype, q.shape[-1]) and capability(q.device) >= 80:
            grouped = True
        else:
            k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    if q.is_cuda and not torch.compiler.is_compiling():
        q, k, v = aligned(q), aligned(k), aligned(v)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


def _flash_attn_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale, causal=False)


def _flash_attn_2_packed(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    if qkv.ndim == 4:
        return _flash_attn_2(*unpacked(qkv, num_heads), scale)
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv, softmax_scale=scale, causal=False)


def _flash_attn_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=scale, causal=False))


def _flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=scale, causal=False))


def _first(out: Any) -> torch.Tensor:
    """The output of a function that some versions let return (output, lse)."""
    return out[0] if isinstance(out, tuple) else out


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, repeated(k, q.shape[2]), repeated(v, q.shape[2]), scale=scale)


@dataclass(frozen=True)
class Library:
    """What is known of a library.

    run           the adapter; run_packed that of packed qkv, where the library writes dqkv without a copy
    distribution  the name to install it by, "" for what is part of PyTorch; module: the name to import
    oldest        the first version that is known to have the function that `run` calls
    install       the command that gets it
    capabilities  the compute capabilities that it is written for, as (least, most): (90, 90) is Hopper alone
    largest       the largest head_dim; all want multiples of 8
    """

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    distribution: str
    module: str
    oldest: tuple[int, ...]
    install: str
    capabilities: tuple[int, int]
    largest: int
    dtypes: tuple[torch.dtype, ...] = _16_BITS
    run_packed: Callable[[torch.Tensor, int, float], torch.Tensor] | None = None


# Limits are those that the projects' documents name; what they leave out, the tiny launch finds.
LIBRARIES = {
    "cudnn": Library(_cudnn, "", "torch", (), "a CUDA build of PyTorch with cuDNN 9 has it", (80, 129), 128),
    "flash-attn-4": Library(
        *(_flash_attn_4, "flash-attn-4", "flash_attn.cute", (4,), "pip install flash-attn-4==4.0.0b36", (90, 109), 128)
    ),
    "flash-attn-3": Library(
        *(_flash_attn_3, "flash_attn_3", "flash_attn_interface", (3,)),
        *("build the hopper/ folder of github.com/Dao-AILab/flash-attention", (90, 90), 256),
    ),
    "flash-attn-2": Library(
        *(_flash_attn_2, "flash-attn", "flash_attn", (2, 8)),
        *("pip install flash-attn --no-build-isolation", (80, 129), 256),
        run_packed=_flash_attn_2_packed,
    ),
    "xformers": Library(
        *(_xformers, "xformers", "xformers", (0, 0, 30), "pip install xformers", (70, 129), 256),
        dtypes=(*_16_BITS, torch.float32),
    ),
}


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, grouped: bool = False
) -> str | None:
    """What keeps library `name` from running on such tensors, and what to do about it; None where nothing does.

    head_dim None: whatever it is. grouped: k and v have fewer heads than q.
    """
    library = LIBRARIES[name]
    if device.type != "cuda":
        return f"it needs tensors on a GPU, these are on {device.type}; move them, or use backend='sdpa'"
    if missing := _missing(name):
        return missing
    if dtype not in library.dtypes:
        known = ", ".join(str(known) for known in library.dtypes)
        return f"it takes {known}, not {dtype}; convert the tensors, or use backend='sdpa'"
    if head_dim is not None and (head_dim % 8 or head_dim > library.largest):
        return f"it takes a head_dim in multiples of 8 up to {library.largest}, not {head_dim}; use backend='sdpa'"
    (least, most), here = library.capabilities, capability(device)
    if not least <= here <= most:
        return f"it is for GPUs of sm_{least} to sm_{most}, this one is sm_{here}; use backend='sdpa'"
    # A number that equals head_dim: under torch.compile that may be a symbol.
    number = 64 if head_dim is None else next(n for n in range(8, library.largest + 1, 8) if n == head_dim)
    if error := _failure(name, device, dtype, number, grouped):
        kind = "a tiny input with 2 heads of q to one of k" if grouped else "a tiny input"
        return f"it failed on {kind}: {error}; {_remedy(library)}"
    return None


def _constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call `fn` and take what it returns for a constant, rather than trace it.

    What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes seconds.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@_constant
def capability(device: torch.device) -> int:
    """90 for an sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@_constant
def _missing(name: str) -> str | None:
    return look_for(name)


@_constant
def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str | None:
    return launch_tiny(name, device, dtype, head_dim, grouped)


@lru_cache
def look_for(name: str) -> str | None:
    """Whether the package is not there, or too old, and how to get it; None where it is there."""
    library = LIBRARIES[name]
    if not library.distribution:
        return None
    try:
        found = importlib.util.find_spec(library.module)
    except (ImportError, ValueError) as error:
        return f"looking for {library.module} failed ({error}); {_remedy(library)}"
    if found is None:
        return f"{library.distribution} is not installed; {_remedy(library)}"
    version = version_of(name)
    if version is not None and _numbers(version) < library.oldest:
        oldest = ".".join(map(str, library.oldest))
        return f"{library.distribution} {version} is older than {oldest}; {_remedy(library)}"
    return None


def version_of(name: str) -> str | None:
    """The installed version of a library, PyTorch's for what is part of it; None where no metadata says."""
    try:
        return importlib.metadata.version(LIBRARIES[name].distribution or "torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _remedy(library: Library) -> str:
    return f"{library.install}, or use backend='sdpa'"


@lru_cache
def launch_tiny(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str | None:
    """What a forward and backward on a tiny input raise, with the versions; None where they run."""
    shapes = ((1, 64, heads, head_dim) for heads in (1 + grouped, 1, 1))
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
        try:
            LIBRARIES[name].run(q, k, v, 1.0).sum().backward()
        except Exception as error:
            made = f"{LIBRARIES[name].distribution} {version_of(name)} under " if LIBRARIES[name].distribution else ""
            return f"{type(error).__name__}: {error} ({made}PyTorch {torch.__version__}, CUDA {torch.version.cuda})"
    return None


def packed(run: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, int, float], torch.Tensor]:
    """The adapter for packed qkv and the number of q's heads, of one for three tensors."""
    return lambda qkv, num_heads, scale: run(*unpacked(qkv, num_heads), scale)


FUNCTIONS = {**{name: library.run for name, library in LIBRARIES.items()}, "sdpa": sdpa}
PACKED_FUNCTIONS = {
    **{name: library.run_packed or packed(library.run) for name, library in LIBRARIES.items()},
    "sdpa": packed(sdpa),
}
