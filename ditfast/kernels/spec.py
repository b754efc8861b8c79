"""OpSpec: what there is to know about an op, once; tests, checks, benches and tables derive from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._op import Op


@dataclass(frozen=True)
class Case:
    """One set of inputs: sizes of the named dims, further arguments, and how the tensors come.

    mixed    the stream's tensors are float32, the others in the suite's dtype (the dtypes of official autocast)
    strided  every tensor is a view into a larger one: its last dim dense, the other strides and the offset odd
    absent   the optional inputs that are None
    full     breadth, for the full test run only
    """

    name: str
    sizes: Mapping[str, int]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False
    strided: bool = False
    absent: tuple[str, ...] = ()
    full: bool = False


@dataclass(frozen=True)
class OpSpec:
    """One op.

    fn          the public function; takes every name in dims, then the case's kwargs, then backend
    dims        the dims of each tensor by name ("B T D"); a number is a fixed size
    cases       what the tests run; bench: what the compile check and the benches run (DiT-XL/2)
    stream      the inputs that stay float32 in a mixed case
    optional    the inputs that may be None
    integers    upper bound (exclusive) of each input that holds integers
    flops       matrix-multiply FLOPs of the forward, from the inputs (the backward has twice that); None: none
    shard       the dims along which the op may be split without communication in the forward
    recompute   the results that a recompute policy may drop, being cheap to redo
    peers       other implementations by name, for the benches
    """

    op: Op
    fn: Callable[..., Any]
    dims: Mapping[str, str]
    cases: tuple[Case, ...]
    bench: tuple[Case, ...]
    stream: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    integers: Mapping[str, int] = field(default_factory=dict)
    flops: Callable[[Mapping[str, Any]], int] | None = None
    shard: tuple[str, ...] | None = None
    recompute: tuple[str, ...] | None = None
    peers: Mapping[str, Callable[..., Any]] | None = None

    @property
    def name(self) -> str:
        """The op's name, also in torch.ops.ditfast."""
        return self.op.name

    @property
    def source(self) -> Path:
        """The op's file."""
        return Path(self.fn.__code__.co_filename)

    def make_inputs(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of fn for a case, tensors drawn from `generator` (on `device`; not needed on meta)."""
        inputs: dict[str, Any] = {}
        for name, dims in self.dims.items():
            shape = [int(d) if d.isdigit() else case.sizes[d] for d in dims.split()]
            view = tuple(slice(1, size + 1) for size in shape) if case.strided else ()
            room = [size + 2 for size in shape] if case.strided else shape
            if name in self.integers:
                values = torch.randint(self.integers[name], room, device=device, generator=generator)
            else:
                kind = torch.float32 if case.mixed and name in self.stream else dtype
                # A mean that is not zero and a variance that is not one, so that forgetting either shows.
                values = (0.25 + 0.5 * torch.randn(room, device=device, generator=generator)).to(kind)
            inputs[name] = None if name in case.absent else values[view]
        return inputs | dict(case.kwargs)

    def bytes_min(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Bytes that must move: forward, inputs read and outputs written once; backward, their gradients as well."""
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        outputs = self.fn(**meta, backend="reference")
        read = sum(v.nbytes for v in meta.values() if isinstance(v, torch.Tensor))
        graded = sum(v.nbytes for v in meta.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
        written = outputs.nbytes if isinstance(outputs, torch.Tensor) else sum(o.nbytes for o in outputs)
        return {"fwd": read + written, "bwd": written + read + graded}


def token_cases(**fixed: Any) -> tuple[Case, ...]:
    """The cases of an op over (B, T, D): odd sizes, D of DiT-XL, views, mixed dtypes, empty batch; never B = 1."""
    odd = {"B": 5, "T": 63, "D": 48} | fixed
    return (
        Case("odd", odd),
        Case("xl", odd | {"B": 2, "T": 17, "D": 1152}),
        Case("mixed", odd | {"B": 3, "T": 18, "D": 96}, mixed=True),
        Case("strided", odd | {"B": 3, "T": 10, "D": 72}, strided=True),
        Case("one_token", odd | {"B": 16, "T": 1, "D": 33}),
        Case("empty", odd | {"B": 0, "T": 4, "D": 32}),
        Case("no_tokens", odd | {"B": 2, "T": 0, "D": 32}, full=True),
        Case("widest", odd | {"B": 2, "T": 3, "D": 8192}, full=True),
        Case("mixed_strided", odd | {"B": 2, "T": 130, "D": 1000}, mixed=True, strided=True, full=True),
        *(Case(f"D{D}", odd | {"B": 2, "T": 9, "D": D}, full=True) for D in (32, 384, 768, 1024, 1536, 3072, 4096)),
    )


XL_SIZES = {"B": 256, "T": 256, "D": 1152}
XL_CASES = (Case("DiT-XL/2", XL_SIZES), Case("DiT-XL/2 official", XL_SIZES, mixed=True))
