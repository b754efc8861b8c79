"""Is a fused form the same function as the module's own forward? Both run on a copy with random weights.

Structure alone cannot tell: a fork may keep every name and change the formula. The copy lives on the CPU, without hooks
and wrappers, so that models on any device, on meta, or sharded are left alone. Random weights, since the gates of
adaLN-Zero start at zero and would hide what is behind them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ditfast.acceleration.swap import Form, Swap, swapped_class
from ditfast.kernels._op import recording_calls

# Relative to the largest element; another eps, activation or order of chunks is off by 1e-4 and more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def difference(form: type[Form], module: nn.Module) -> str | None:
    """Why the fused form is not the module's own forward, in outputs or gradients; None where it is."""
    own_class, fused_class = type(module), swapped_class(Swap(form, type(module)))
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
        copy = _copy(module, form.dtype)
        for training in (False, True):
            for part in copy.modules():
                part.training = training
            try:
                inputs = tree_map_only(
                    Tensor, lambda t: t.to(form.dtype) if t.is_floating_point() else t, form.example(module)
                )
                copy.__class__ = own_class
                own = _run(copy, inputs)
                copy.__class__ = fused_class
                with recording_calls() as calls:
                    fused = _run(copy, inputs)
            except Exception as error:
                return f"it cannot be tried on a CPU ({type(error).__name__}: {error})"
            if (ran := tuple(op for op, _ in calls)) != form.ops:
                return f"fused, it runs {', '.join(ran) or 'no op'}, expected {', '.join(form.ops)}"
            if problem := _largest_error(own, fused, TOLERANCE[form.dtype]):
                return f"its own forward is another function: {problem}"
    return None


def signature(module: nn.Module) -> Any:
    """Equal for modules of the same classes, shapes and settings, which need to be compared only once."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (key, tuple(tensor.shape))
                for key, tensor in (*part._parameters.items(), *part._buffers.items())
                if tensor is not None
            ),
            tuple((key, _setting(value)) for key, value in vars(part).items() if key != "training"),
        )
        for name, part in module.named_modules()
    )


def _setting(value: Any) -> Any:
    plain = isinstance(value, bool | int | float | str | tuple | torch.dtype | type(None))
    return repr(value) if plain else type(value)


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same tree of modules with other weights, in `dtype` on the CPU, without hooks or patched forwards."""
    copy = object.__new__(type(module))
    copy.__dict__.update(vars(module))
    copy.__dict__.update((key, type(value)()) for key, value in vars(nn.Module()).items() if "hooks" in key)
    copy.__dict__.pop("forward", None)
    copy.__dict__["_compiled_call_impl"] = None
    copy.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(_random(p, dtype), requires_grad=p.is_floating_point())
        for name, p in module._parameters.items()
    }
    copy.__dict__["_buffers"] = {name: None if b is None else _random(b, dtype) for name, b in module._buffers.items()}
    copy.__dict__["_modules"] = {
        name: None if child is None else _copy(child, dtype) for name, child in module._modules.items()
    }
    return copy


def _random(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape that keeps what it multiplies at its size."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    bound = (3 / max(1, math.prod(like.shape[1:]))) ** 0.5
    return torch.empty(like.shape, dtype=dtype).uniform_(-bound, bound)


def _run(module: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs of the module's forward, and the gradients of the floating-point inputs."""
    torch.default_generator.manual_seed(1)  # for what a module draws in training mode
    args, kwargs = tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), inputs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [out for out in tree_leaves(module.forward(*args, **kwargs)) if isinstance(out, Tensor)]
    douts = [torch.rand(out.shape, dtype=out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, leaves, douts, allow_unused=True)
    return [
        *outputs,
        *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)),
    ]


def _largest_error(own: list[Tensor], fused: list[Tensor], tolerance: float) -> str | None:
    if [(t.shape, t.dtype) for t in own] != [(t.shape, t.dtype) for t in fused]:
        return "its results have other shapes or dtypes"
    for expected, result in zip(own, fused, strict=True):
        error, size = (result - expected).abs().max().item(), expected.abs().max().item()
        if not error <= tolerance * size:
            return f"results differ by {error:.1e} where they are {size:.1e} large"
    return None
