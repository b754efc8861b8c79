"""Compile every Triton kernel for a GPU that need not be there, and read what it uses from the binary.

The launches are recorded from the ops themselves, run on meta tensors at the shapes of OPS' benches, so a kernel cannot
be forgotten here. ptxas and cuobjdump come with Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import _triton
from .spec import Case, OpSpec

# Opt-in shared memory of a thread block, bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
_TENSOR_CORE = re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", re.MULTILINE)
_HGMMA = re.compile(r"^\s*(?:@\S+\s+)?wgmma\.mma_async", re.MULTILINE)
_DOT = re.compile(r"\btt\.dot(?:_scaled)? .*tensor<[\dx]+x(?:bf16|f16)>")
_TF32_DOT = re.compile(r"\btt\.dot .*inputPrecision = tf32")
_LOAD = re.compile(r"\bLDG\S*")
_WIDE = re.compile(r"\.(?:128|256)\b")
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one architecture.

    spills in bytes a thread; loads are instructions that read global memory, wide_loads those of 16 bytes or more a
    thread; tensor_core are instructions too, and hgmma those of them that are Hopper's; dots are tl.dot of 16 bits,
    tf32_dots those of float32 in TF32.
    """

    op: str
    case: str
    kernel: str
    arch: str
    config: dict[str, Any]
    registers: int
    spills: int
    shared_bytes: int
    loads: int
    wide_loads: int
    tensor_core: int
    hgmma: int = 0
    dots: int = 0
    tf32_dots: int = 0

    @property
    def faults(self) -> list[str]:
        """What is wrong: spills, shared memory beyond the chip's, dots of 16 bits or TF32 without tensor cores.

        On sm_90 only HGMMA counts as a tensor core for 16 bits: mma.sync has but half its rate there.
        """
        fast = self.hgmma == self.tensor_core > 0 if self.arch == "sm_90" else self.tensor_core > 0
        found = {
            "SPILLS": self.spills > 0,
            "TOO LARGE": self.shared_bytes > SHARED_LIMITS[self.arch],
            "SLOW DOTS": (self.dots > 0 and not fast) or (self.tf32_dots > 0 and not self.tensor_core),
        }
        return [fault for fault, here in found.items() if here]

    @property
    def ok(self) -> bool:
        """No faults."""
        return not self.faults


def launches(spec: OpSpec, case: Case, dtype: torch.dtype, arch: str = "sm_90") -> list[_triton.Launch]:
    """The launches of one forward and backward, recorded on meta tensors."""
    inputs = spec.make_inputs(case, dtype, "meta")
    leaves = [v.requires_grad_() for v in spec.graded(inputs).values()]
    with _triton.recording(int(arch.removeprefix("sm_"))) as recorded:
        outputs = spec.call(inputs, "triton")
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
    return recorded


def check(specs: Sequence[OpSpec], archs: Sequence[str], dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """One Row per kernel of every spec that has a Triton side, per bench case and architecture.

    RuntimeError under TRITON_INTERPRET, where there is nothing to compile; ValueError for an unknown architecture.
    """
    if not _triton.INSTALLED or _triton.INTERPRETED:
        raise RuntimeError("the compile check needs triton, and a process without TRITON_INTERPRET in its environment")
    if unknown := [arch for arch in archs if arch not in SHARED_LIMITS]:
        raise ValueError(f"architecture {unknown[0]!r} is not one of {', '.join(SHARED_LIMITS)}")
    for arch in archs:
        for spec in specs:
            for case in spec.bench if "triton" in spec.op.backends else ():
                for launch in launches(spec, case, dtype, arch):
                    yield inspect(spec.name, case.name, arch, launch)


def inspect(op: str, case: str, arch: str, launch: _triton.Launch) -> Row:
    """The Row of a launch compiled for an architecture."""
    compiled = _compile(launch, arch)
    registers, spills, loads = _read_binary(compiled.asm["cubin"])
    return Row(
        op=op,
        case=case,
        kernel=launch.kernel.__name__,
        arch=arch,
        config=launch.meta,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        loads=len(loads),
        wide_loads=sum(1 for load in loads if _WIDE.search(load)),
        tensor_core=len(_TENSOR_CORE.findall(compiled.asm["ptx"])),
        hgmma=len(_HGMMA.findall(compiled.asm["ptx"])),
        dots=len(_DOT.findall(compiled.asm["ttir"])),
        tf32_dots=len(_TF32_DOT.findall(compiled.asm["ttir"])),
    )


def _compile(launch: _triton.Launch, arch: str) -> Any:
    """What Triton would compile for these arguments, pointers taken as aligned to 16 bytes, as torch allocates."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    names = launch.kernel.arg_names
    arguments = dict(zip(names, launch.args, strict=False)) | {k: v for k, v in launch.meta.items() if k in names}
    for i, name in enumerate(names):
        value = arguments[name]
        if name in launch.meta or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {name: value for name, value in launch.meta.items() if name not in names}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def _read_binary(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack and local memory of a thread, and the global loads of the machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(tool: str, *arguments: str) -> str:
        return subprocess.run([tools / tool, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = run("cuobjdump", "--dump-resource-usage", file.name), run("nvdisasm", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return used["REG"], used["STACK"] + used["LOCAL"], _LOAD.findall(code)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("op", "case", "kernel", "arch", "warps", "registers", "spills", "shared", "wide loads", "tensor core", "")
    lines = [head] + [
        (
            *(row.op, row.case, row.kernel, row.arch, str(row.config.get("num_warps", 4)), str(row.registers)),
            *(str(row.spills), str(row.shared_bytes), f"{row.wide_loads} of {row.loads}", str(row.tensor_core)),
            ", ".join(row.faults) or "ok",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain objects."""
    return [asdict(row) for row in rows]
