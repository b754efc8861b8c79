"""A module computed by another forward: the class is swapped in place, and everything that hangs on the module stays.

Parameters, buffers, submodules, hooks, attributes and the module itself are the same objects before and after, so
optimizers, state dicts, EMA copies, wrappers and `isinstance` see no change. Another module in its place would lose
what hangs on it or points to it; a forward bound to the instance would neither pickle nor yield to a subclass. What the
fused form does not cover (see `Form.unfit`, asked at every call) runs the module's own forward.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditfast.layers.plain import is_plain


class Form:
    """How modules of one kind are computed by ditfast's ops. A class of static methods, never an instance.

    what       the kind, for people
    ops        the ops that one call runs, in order, those of submodules aside
    required   names of submodules; allowed: others that may be there besides
    dtype      of the comparison with the module's own forward
    """

    what: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    required: ClassVar[frozenset[str]] = frozenset()
    allowed: ClassVar[frozenset[str]] = frozenset()
    is_block: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float64

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        """Whether the module is of this kind by its structure, fit or not."""
        return bool(cls.required) and cls.required <= module._modules.keys()

    @staticmethod
    def unfit(module: Any) -> str | None:
        """Why this module cannot be computed by the ops, as it is now; None where it can."""
        raise NotImplementedError

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one call, on the CPU: B = 2, few tokens."""
        raise NotImplementedError

    @staticmethod
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; NotImplemented for arguments that the ops do not cover."""
        raise NotImplementedError


class Swap(NamedTuple):
    """What a swapped class is made of; `backends` holds (op, backend) where it is not "auto"."""

    form: type[Form]
    base: type[nn.Module]
    backends: tuple[tuple[str, str], ...] = ()


class Swapped(nn.Module):
    """The marker among the bases of swapped classes."""

    ditfast_swap: ClassVar[Swap]

    def _get_name(self) -> str:
        # Only for repr: the class keeps its name, which wrapping policies and device maps go by.
        return f"Fused{type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Made at run time, the class cannot be found by name when it is unpickled.
        return (_new, (self.ditfast_swap,), *super().__reduce_ex__(protocol)[2:])


def _new(swap: Swap) -> nn.Module:
    return object.__new__(swapped_class(swap))


@functools.cache
def swapped_class(swap: Swap) -> type:
    """`swap.base` with the forward of `swap.form`; equal swaps give the same class."""
    form, base, _ = swap

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = NotImplemented if form.unfit(self) else form.forward(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs) if result is NotImplemented else result

    return type(base.__name__, (Swapped, base), {"forward": forward, "ditfast_swap": swap})


def on(module: Any, op: str) -> str:
    """The backend that was asked for this op."""
    return dict(module.ditfast_swap.backends).get(op, "auto")


def compute_dtype(x: Tensor, other: Tensor) -> torch.dtype:
    """The dtype in which a linear takes the result of x and `other`: autocast's, else the wider of the two."""
    device, dtype = x.device.type, torch.promote_types(x.dtype, other.dtype)
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def norm_problem(module: nn.Module, name: str) -> str | None:
    """Why an op cannot stand in for the norm of that name."""
    norm = getattr(module, name)
    if is_plain(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None:
        return None
    return f"{name} is not a bare LayerNorm without weight and bias but {described(norm)}"


def idle_problem(module: nn.Module, *names: str) -> str | None:
    """Which of the submodules, if there, is more than an identity: a dropout with p > 0, a norm, a hook."""
    for name in names:
        part = getattr(module, name, None)
        idle = part is None or is_plain(part, nn.Identity) or (is_plain(part, nn.Dropout) and part.p == 0)
        if not idle:
            return f"{name} is {described(part)}, expected none, an identity or a dropout with p = 0"
    return None


def linear_problem(name: str, linear: Any, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why an op cannot read the weights of this linear (or convolution) in place of calling it."""
    if not is_plain(linear, kind) or linear.bias is None:
        return f"{name} is not a bare {kind.__name__} with bias but {described(linear)}"
    if type(linear.weight) not in (nn.Parameter, Tensor):
        return f"the weight of {name} is a {type(linear.weight).__name__}"
    return None


def inputs_of(linear: Any) -> int:
    """The number of inputs of a linear; of a wrapper that does not tell, that of the first matrix in it."""
    return getattr(linear, "in_features", None) or next(p for p in linear.parameters() if p.ndim == 2).shape[1]


def described(part: Any) -> str:
    """The part for a message, with what keeps it from being plain."""
    if not isinstance(part, nn.Module):
        return repr(part)
    text = repr(part).partition("\n")[0].removesuffix("(")
    return text if is_plain(part, type(part)) else f"{text} with hooks or a changed forward"
