"""OpSpec: what there is to know about an op, once; tests, checks, benches and tables derive from it."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ._op import Op, _tuple


@dataclass(frozen=True)
class Case:
    """One set of inputs: sizes of the named dims, further arguments, and how the tensors come.

    mixed    the stream's tensors are float32, the others in the suite's dtype (the dtypes of official autocast)
    strided  every tensor is a view into a larger one: its last dim dense, the other strides and the offset odd
    absent   the optional inputs that are None
    float32  further inputs that are float32
    dtypes   further arguments that are the suite's dtype
    floats   the inputs that hold integers come as floats, and have gradients
    full     breadth, for the full test run only
    """

    name: str
    sizes: Mapping[str, int]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False
    strided: bool = False
    absent: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    floats: bool = False
    full: bool = False


@dataclass(frozen=True)
class OpSpec:
    """One op.

    fn          the public function; takes every name in dims, then the case's kwargs, then backend
    dims        the dims of each tensor by name ("B T D"); a number is a fixed size
    cases       what the tests run; bench: what the compile check and the benches run, DiT-XL/2 first
    stream      the inputs that stay float32 in a mixed case
    float32     the inputs that are float32 in every case
    optional    the inputs that may be None
    integers    upper bound (exclusive) of each input that holds integers
    flops       matrix-multiply FLOPs of the forward, from the inputs (the backward has twice that); None: none
    shard       the dims along which the op may be split without communication in the forward
    recompute   the results that a recompute policy may drop, being cheap to redo
    peers       other implementations by name, for the benches
    bwd_unread  the arguments of the raw backward that it does not read: its minimal bytes are without them
    mutates     the inputs, tensors or lists of them, that fn reads and writes in place; it then returns nothing
    overwrites  those that it writes without reading
    inputs      makes the inputs, in place of `dims`: of (case, dtype, device, generator)
    traffic     what the traffic count runs, where the benches with two samples are not representative or too large
    limits      those of traffic.LIMITS that an op is above by design, with a reason; or what makes them of the inputs
    resize      makes a case with other sizes, of (case, sizes), where others follow from them; ValueError for none
    slack       by how much the RMS errors may exceed the parity budget where the method rounds once more, by the
                tensors' names, from the inputs; None: by nothing
    forms       the names of the cases from which on the op runs on other kernels
    """

    op: Op
    fn: Callable[..., Any]
    dims: Mapping[str, str]
    cases: tuple[Case, ...]
    bench: tuple[Case, ...]
    stream: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    integers: Mapping[str, int] = field(default_factory=dict)
    flops: Callable[[Mapping[str, Any]], int] | None = None
    shard: tuple[str, ...] | None = None
    recompute: tuple[str, ...] | None = None
    peers: Mapping[str, Callable[..., Any]] | None = None
    bwd_unread: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    overwrites: tuple[str, ...] = ()
    inputs: Callable[..., dict[str, Any]] | None = None
    traffic: tuple[Case, ...] | None = None
    limits: Mapping[str, float] | Callable[[Mapping[str, Any]], Mapping[str, float]] = field(default_factory=dict)
    slack: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
    resize: Callable[[Case, Mapping[str, int]], Case] | None = None
    forms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The op's name, also in torch.ops.ditfast."""
        return self.op.name

    @property
    def source(self) -> Path:
        """The op's file, of a package its __init__.py."""
        return Path(inspect.unwrap(self.fn).__code__.co_filename)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The op's file, or all those of its package."""
        return tuple(sorted(self.source.parent.glob("*.py"))) if self.source.stem == "__init__" else (self.source,)

    @property
    def by_form(self) -> dict[str, "OpSpec"]:
        """The spec by its name, and those of the cases of each further form by its name and theirs."""
        names = [case.name for case in self.cases]
        starts = {f"{self.name}-{form}": names.index(form) for form in self.forms}
        return {self.name: self} | {name: replace(self, cases=self.cases[i:]) for name, i in starts.items()}

    def make_inputs(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of fn for a case, tensors drawn from `generator` (on `device`; not needed on meta)."""
        if self.inputs:
            return self.inputs(case, dtype, device, generator) | dict.fromkeys(case.absent)
        inputs: dict[str, Any] = {}
        for name, dims in self.dims.items():
            shape = [int(d) if d.isdigit() else case.sizes[d] for d in dims.split()]
            view = tuple(slice(1, size + 1) for size in shape) if case.strided else ()
            room = [size + 2 for size in shape] if case.strided else shape
            if name in self.integers and not case.floats:
                values = torch.randint(self.integers[name], room, device=device, generator=generator)
            else:
                wide = (*self.float32, *case.float32, *(self.stream if case.mixed else ()))
                kind = torch.float32 if name in wide else dtype
                # A mean that is not zero and a variance that is not one, so that forgetting either shows.
                values = (0.25 + 0.5 * torch.randn(room, device=device, generator=generator)).to(kind)
            inputs[name] = None if name in case.absent else values[view]
        return inputs | dict(case.kwargs) | dict.fromkeys(case.dtypes, dtype)

    def graded(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors among the inputs that every backend has the gradient of."""
        without = getattr(self.op.kernels, "constants", ()) if self.op.differentiable else inputs
        tensors = {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor) and name not in without}
        return {name: v for name, v in tensors.items() if v.is_floating_point()}

    def call(self, inputs: Mapping[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
        """The outputs of fn, or of an op that works in place, copies of what it writes: `inputs` stay as they are.

        The tensors of a list are one flat output, since an error's RMS over a bias of a few elements is an accident.
        """
        written = (*self.mutates, *self.overwrites)
        copies = tree_map_only(torch.Tensor, torch.clone, {name: inputs[name] for name in written})
        outputs = self.fn(**{**inputs, **copies}, backend=backend)
        lists = filter(None, (tree_leaves(value) for value in copies.values() if value is not None))
        return tuple(torch.cat([t.flatten() for t in each]) for each in lists) if written else _tuple(outputs)

    def bytes_min(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Bytes that must move in "fwd" (inputs read, outputs written) and, where there are gradients, "bwd".

        The backward reads the outputs' gradients and, but for `bwd_unread`, the inputs and what the forward saved for
        it (mean and rstd of a norm), and writes the inputs' gradients, but for those that are an output's, handed on.
        """
        if self.mutates:
            read = tree_leaves({name: value for name, value in inputs.items() if name not in self.overwrites})
            written = tree_leaves([inputs[name] for name in (*self.mutates, *self.overwrites)])
            return {"fwd": sum(v.nbytes for v in (*read, *written) if isinstance(v, torch.Tensor))}
        meta = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        tensors = {k: v for k, v in meta.items() if isinstance(v, torch.Tensor)}
        leaves = [v.requires_grad_() for v in self.graded(tensors).values()]
        with RawCalls() as raw:
            outputs = self.fn(**meta, backend="triton" if self.op.kernels else "reference")
            outputs = _tuple(outputs)
            graded = [out for out in outputs if out.requires_grad]
            if graded:
                torch.autograd.grad(graded, leaves, [torch.empty_like(out) for out in graded], allow_unused=True)
        fwd = sum(v.nbytes for v in (*tensors.values(), *outputs))
        if not graded:
            return {"fwd": fwd}
        backward = next((_named(*c) for c in raw.made if c[0]._schema.name == f"ditfast::{self.name}_bwd"), {})
        arguments = backward or tensors | {f"dout{i}": out for i, out in enumerate(graded)}
        reads = sum(v.nbytes for name, v in arguments.items() if name not in self.bwd_unread)
        through = getattr(self.op.kernels, "through", {})
        writes = sum(v.nbytes for name, v in tensors.items() if v.requires_grad and name not in through)
        return {"fwd": fwd, "bwd": reads + writes}


class RawCalls(TorchDispatchMode):
    """Notes the calls of the package's raw ops inside, (op, arguments) in `made`; all run as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call if it is one, and make it."""
        if func.namespace == "ditfast":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def square(tokens: int) -> int:
    """Tokens along a side of a square image; ValueError where there is no such."""
    if (side := math.isqrt(tokens)) ** 2 != tokens:
        raise ValueError(f"{tokens} tokens are no square image")
    return side


def _named(func: Any, args: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """The tensors among a raw op's arguments, by the names of its schema."""
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    return {name: arg for name, arg in named if isinstance(arg, torch.Tensor)}


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
XL_CASES = (
    Case("DiT-XL/2", XL_SIZES),
    Case("DiT-XL/2 official", XL_SIZES, mixed=True),
    Case("LargeDiT-3B", XL_SIZES | {"D": 3072}),
)
