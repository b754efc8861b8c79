"""From a reference and, where there are any, Triton launchers to an op: backends, `ditfast::` registration, autograd.

The form of registration was chosen by its cost per call: raw ops by define / impl under one autograd.Function take a
third of what custom_op with register_autograd takes, and are as opaque to torch.compile. A raw op has no derivative.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from . import _triton

_LIBRARY = torch.library.Library("ditfast", "FRAGMENT")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_calls: list[tuple[str, str]] | None = None


@contextmanager
def recording_calls() -> Iterator[list[tuple[str, str]]]:
    """Collect (op, backend) of every call inside, in order."""
    global _calls
    outer, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = outer


class BackendError(ValueError):
    """A backend that does not exist or cannot run here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Kernels:
    """The Triton side of an op; `Op` makes the raw ops <name>_fwd and <name>_bwd and the autograd of it.

    inputs, attrs   schema of the tensors and of the other arguments: "Tensor x, Tensor? gate", "float eps"
    outputs, saved  names of the forward's results; the saved ones are for the backward only
    reads           the outputs that the backward reads
    stand_ins       {"x": "x_new"}: the backward gets that output, of equal shape and dtype, and input x is not kept
    through         {"x": "x_new"}: the gradient of x is that of this output, and the backward has no part in it
    unread_without  {"branch": "gate"}: where gate is None the backward reads but the shape and dtype of branch, and
                    gets an expanded scalar, so that branch is not kept
    constants       inputs without a gradient; where autograd wants it, the kernels cannot run
    skips           inputs whose gradient the backward leaves out where autograd does not want it: the grad is then None
    empty(*inputs, *attrs)                            the results, not yet written
    fwd(results, *inputs, *attrs)                     writes them
    bwd(grads, *douts, *inputs, *reads, *saved, *attrs)  writes grads, contiguous tensors like the inputs; without those
                                                      in `through` and `constants`, empty for one that is None
                                                      None: no derivative, and only the raw op <name>_fwd
    """

    inputs: str
    attrs: str
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    empty: Callable[..., tuple[torch.Tensor, ...]]
    fwd: Callable[..., None]
    bwd: Callable[..., None] | None
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    through: Mapping[str, str] = field(default_factory=dict)
    unread_without: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class InPlace:
    """The Triton side of an op that writes into its arguments: one raw op <name>, without results or derivative.

    schema      the arguments, tensors first, those that are written marked: "Tensor(a!)[] weights, Tensor[] grads"
    run(*args)  does it
    """

    schema: str
    run: Callable[..., None]


@dataclass(frozen=True)
class Op:
    """One operation and everything that can compute it.

    ref(*inputs, *attrs) is differentiable plain PyTorch; functions holds other differentiable forms by backend name;
    kernels the Triton side. Backends are preferred in the order of `backends`.
    auto(device, dtype, inputs) says what "auto" takes, where that is no matter of order;
    refusal(backend, device, dtype, inputs) what keeps a backend from running on such inputs, with the remedy.
    Both get no inputs where none are known. optional: the inputs that may be None, by the schema.
    """

    name: str
    ref: Callable[..., Any]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    kernels: Kernels | InPlace | None = None
    auto: Callable[[torch.device, torch.dtype, Sequence[Any]], str] | None = None
    refusal: Callable[[str, torch.device, torch.dtype, Sequence[Any]], str | None] | None = None
    optional: frozenset[str] = field(default=frozenset(), init=False)
    _apply: Callable[..., Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.kernels:
            register: Any = _register_in_place if isinstance(self.kernels, InPlace) else _register
            schema = self.kernels.schema if isinstance(self.kernels, InPlace) else self.kernels.inputs
            object.__setattr__(self, "optional", frozenset(re.findall(r"Tensor(?:\(\w!\))?\? (\w+)", schema)))
            object.__setattr__(self, "_apply", register(self.name, self.kernels))

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend of this op, the preferred first."""
        return (*(("triton",) if self.kernels else ()), *self.functions, "reference")

    @property
    def differentiable(self) -> bool:
        """Whether every backend has a derivative."""
        return self.kernels is None or (isinstance(self.kernels, Kernels) and self.kernels.bwd is not None)

    def choose(self, asked: str, device: torch.device, dtype: torch.dtype, inputs: Sequence[Any] = ()) -> str:
        """The concrete backend for inputs of this device and dtype; BackendError where `asked` cannot run.

        "auto" is the first of `backends`, except that triton is for floats of 16 and 32 bits and for integers on a GPU:
        anywhere else it is slow. Nor where autograd wants a derivative that the kernels lack.
        A GPU without Triton is an error, not a reason to fall back.
        """
        underived = _graded(self._underived(inputs))
        if asked == "auto" and self.auto:
            asked = self.auto(device, dtype, inputs)
        elif asked == "auto":
            skipped = () if device.type == "cuda" and _taken(dtype) and not underived else ("triton",)
            asked = next(backend for backend in self.backends if backend not in skipped)
        elif asked not in self.backends:
            known = ", ".join(repr(backend) for backend in ("auto", *self.backends))
            raise BackendError(f"{self.name}: backend {asked!r} is not one of {known}")
        if asked == "triton" and underived:
            raise BackendError(
                f"{self.name}: backend 'triton' has no derivative by an input that requires one; detach it, call the "
                "op under torch.no_grad(), or pass backend='reference'"
            )
        if self.refusal and (why := self.refusal(asked, device, dtype, inputs)):
            raise BackendError(f"{self.name}: backend {asked!r} cannot run: {why}")
        if asked == "triton" and (missing := _missing(device, dtype)):
            raise BackendError(f"{self.name}: backend 'triton' cannot run: {missing}, or pass backend='reference'")
        return asked

    def __call__(self, backend: str, inputs: Sequence[Any], attrs: Sequence[Any] = ()) -> Any:
        """The outputs, differentiable, by the backend asked for; inputs are tensors, None, or lists of tensors."""
        lead = next(given for given in inputs if given is not None)
        lead = lead[0] if isinstance(lead, list) else lead
        backend = self.choose(backend, lead.device, _first_refused(lead.dtype, inputs, attrs), inputs)
        if _calls is not None:
            _calls.append((self.name, backend))
        if backend == "triton":
            assert self._apply is not None
            return self._apply(*inputs, *attrs)
        return self.functions.get(backend, self.ref)(*inputs, *attrs)

    def _underived(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Those of the inputs that the kernels have no gradient of."""
        if not self.differentiable:
            return inputs
        if not inputs or not isinstance(self.kernels, Kernels) or not self.kernels.constants:
            return ()
        named = zip(_names(self.kernels), inputs, strict=True)
        return [value for name, value in named if name in self.kernels.constants]


def _graded(inputs: Sequence[Any]) -> bool:
    """Whether autograd is on and wants the gradient of one of these."""
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs)


def _first_refused(dtype: torch.dtype, inputs: Sequence[Any], attrs: Sequence[Any]) -> torch.dtype:
    """The first dtype of these that the kernels do not take, of inputs and outputs; else `dtype`, of the first input.

    Beside float32 tensors one in float64 makes results in float64, which the kernels would compute in float32.
    """
    for value in inputs:
        if isinstance(value, torch.Tensor) and not _taken(value.dtype):
            return value.dtype
    for value in attrs:
        if isinstance(value, torch.dtype) and not _taken(value):
            return value
    return dtype


def _taken(dtype: torch.dtype) -> bool:
    """Whether the kernels take an input of this dtype; integers are only those of ops that are about them."""
    return dtype in _TRITON_DTYPES or not dtype.is_floating_point


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps Triton from running on such tensors, and what to do about it."""
    if not _taken(dtype):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}; convert the tensors"
    if device.type == "meta":
        return None
    if not _triton.INSTALLED:
        return f"triton cannot be imported ({_triton.IMPORT_ERROR}); pip install triton"
    if device.type != "cuda" and not _triton.INTERPRETED:
        return f"tensors on {device.type} need its interpreter; set TRITON_INTERPRET=1 before importing, use a GPU"
    return None


def _register(name: str, kernels: Kernels) -> Callable[..., Any]:
    """Define ditfast::<name>_fwd and _bwd for CPU, CUDA, meta and fake tensors; return the differentiable pair.

    Without a backward: <name>_fwd alone.
    """
    n_out, kept, backward = len(kernels.outputs), _kept(kernels), kernels.bwd
    graded = [input for input in kept if input not in kernels.constants]

    def fwd(*args: Any) -> tuple[torch.Tensor, ...]:
        results = kernels.empty(*args)
        kernels.fwd(results, *args)
        return results

    def fwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
        return fwd(*args) if _triton.is_recording() else kernels.empty(*args)

    def bwd(*args: Any) -> tuple[torch.Tensor, ...]:
        grads = bwd_empty(*args)
        assert backward is not None
        if not kernels.skips:
            backward(grads, *args)
            return grads
        backward(tuple(grad if want else None for grad, want in zip(grads, args[-1], strict=True)), *args[:-1])
        return grads

    def bwd_empty(*args: Any) -> tuple[torch.Tensor, ...]:
        # A raw op cannot return None, so the gradient of an absent input, or one not wanted, is empty.
        likes = [like for input, like in zip(kept, args[n_out:], strict=False) if input not in kernels.constants]
        wanted = args[-1] if kernels.skips else [True] * len(likes)
        return tuple(
            torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if want and like is not None
            else torch.empty(0, device=args[0].device)
            for like, want in zip(likes, wanted, strict=True)
        )

    def bwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
        return bwd(*args) if _triton.is_recording() else bwd_empty(*args)

    raw_fwd = _define(f"{name}_fwd", (kernels.inputs, kernels.attrs), n_out + len(kernels.saved), fwd, fwd_fake)
    if backward is None:
        return raw_fwd
    arguments = (
        *(f"Tensor d{output}" for output in kernels.outputs),
        *(" ".join(declaration) for declaration in kept.values()),
        *(f"Tensor {name}" for name in (*kernels.reads, *kernels.saved)),
        kernels.attrs,
        "bool[] wanted" if kernels.skips else "",
    )
    raw_bwd = _define(f"{name}_bwd", arguments, len(graded), bwd, bwd_fake)
    return _differentiable(name, kernels, raw_fwd, raw_bwd)


def _kept(kernels: Kernels) -> dict[str, tuple[str, str]]:
    """What the backward gets in place of each input that it grades or reads: its type and name."""
    declared = [declaration.split() for declaration in kernels.inputs.split(",")]
    return {
        input: (kind, kernels.stand_ins.get(input, input)) for kind, input in declared if input not in kernels.through
    }


def _names(kernels: Kernels) -> list[str]:
    """The inputs by name."""
    return [declaration.split()[-1] for declaration in kernels.inputs.split(",")]


def _differentiable(
    name: str, kernels: Kernels, raw_fwd: Callable[..., Any], raw_bwd: Callable[..., Any]
) -> Callable[..., Any]:
    """The function of both raw ops that autograd knows."""
    inputs = _names(kernels)
    outputs, kept, n_in, n_out = kernels.outputs, _kept(kernels), len(inputs), len(kernels.outputs)
    constants = kernels.constants

    class Apply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = _tuple(raw_fwd(*args))
            known = dict(zip((*inputs, *outputs), (*args[:n_in], *results[:n_out]), strict=True))
            for input, other in kernels.unread_without.items():
                if known[other] is None:
                    known[input] = known[input].new_empty(()).expand_as(known[input])
            read = (*(stand_in for _, stand_in in kept.values()), *kernels.reads)
            ctx.save_for_backward(*(known[name] for name in read), *results[n_out:])
            ctx.attrs = args[n_in:]
            return results[0] if n_out == 1 else results[:n_out]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *douts: torch.Tensor) -> Any:
            saved = ctx.saved_tensors
            graded = [(input, like) for input, like in zip(kept, saved, strict=False) if input not in constants]
            needed = dict(zip(inputs, ctx.needs_input_grad, strict=False))
            wanted = [input not in kernels.skips or needed[input] for input, _ in graded]
            raw = _tuple(raw_bwd(*douts, *saved, *ctx.attrs, *([wanted] if kernels.skips else [])))
            given = zip(graded, wanted, raw, strict=True)
            grads = {input: grad if want and like is not None else None for (input, like), want, grad in given}
            grads |= {input: douts[outputs.index(output)] for input, output in kernels.through.items()}
            return *(grads.get(input) for input in inputs), *(None for _ in ctx.attrs)

    Apply.__name__ = Apply.__qualname__ = name
    return Apply.apply


def _register_in_place(name: str, kernels: InPlace) -> Callable[..., Any]:
    """Define ditfast::<name> for CPU, CUDA, meta and fake tensors."""

    def impl(*args: Any) -> None:
        kernels.run(*args)
        # A kernel writes behind autograd's back, which would then not notice that a tensor it saved has changed.
        written = (arg for arg, is_written in zip(args, writes, strict=True) if is_written)
        torch.autograd.graph.increment_version([t for t in tree_leaves(list(written)) if t is not None])

    def fake(*args: Any) -> None:
        if _triton.is_recording():
            kernels.run(*args)

    op = _define(name, (kernels.schema,), 0, impl, fake)
    writes = [bool(arg.alias_info and arg.alias_info.is_write) for arg in op._schema.arguments]
    return op


def _define(
    name: str, arguments: Sequence[str], n_results: int, impl: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """The raw op ditfast::<name>."""
    signature = ", ".join(filter(None, arguments))
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{name}({signature}) -> ({', '.join(['Tensor'] * n_results)})", tags=tags)
    if n_results == 1:
        impl, fake = _only(impl), _only(fake)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, impl, device)
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ditfast, name).default


def _only(fn: Callable[..., tuple[torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """The result of `fn` out of its tuple: a schema of one result wants it bare."""
    return lambda *args: fn(*args)[0]


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(out for out in results if out is not None)
