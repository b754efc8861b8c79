"""Fused blocks into somebody else's DiT, and back: `ditfast.accelerate(model)`, `ditfast.restore(model)`.

Taken over are the blocks of the official DiT and SiT and of code with their structure, and of diffusers'
DiTTransformer2DModel, together with what they consist of; see `official` and `diffusers` for the kinds. A module is
recognized by its structure, compared with its fused form on random weights, and only then swapped, in place, by its
class (`swap`). What is not recognized, or computes something else, stays as it is and is reported.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ditfast import kernels
from ditfast.acceleration import diffusers, official
from ditfast.acceleration.probe import difference, signature
from ditfast.acceleration.report import Report, Taken
from ditfast.acceleration.swap import Form, Swap, Swapped, swapped_class

FORMS: tuple[type[Form], ...] = (*official.FORMS, *diffusers.FORMS)
SUPPORTED = (
    "the official DiT or SiT, models with blocks of their structure (norm1, attn, norm2, mlp, adaLN_modulation), "
    "and diffusers' DiTTransformer2DModel"
)


def accelerate(model: nn.Module, backend: str | Mapping[str, str] = "auto") -> Report:
    """Compute the blocks of `model`, and what of it else it can, by ditfast's ops; returns what was done, printable.

    The model stays the same object with the same parameters, state dict, hooks and attributes, in place; outputs and
    gradients stay within the kernels' error budgets. A part that is changed later (hooks, LoRA, another processor, a
    mask) runs its own forward again. Calling it again looks at the model anew; `restore` undoes it.

    model: anything that contains such blocks; it may be wrapped. Move it to its device before, since backends are
        checked; shard it (fully_shard) after.
    backend: of every op, or {op: backend} where it is not "auto".
    Raises ValueError where there is no block to take over, and BackendError for a backend that cannot run there; the
    model is then as it was, but for an accelerated one without blocks any more, which is its own.
    """
    if not isinstance(model, nn.Module):
        hint = "; pass its `transformer`" if hasattr(model, "transformer") else ""
        raise ValueError(
            f"accelerate: model is a {type(model).__name__}, expected a torch.nn.Module: {SUPPORTED}{hint}"
        )
    asked = _asked(backend)
    fused = [module for module in model.modules() if isinstance(module, Swapped)]
    if block := next((module for module in fused if module.ditfast_swap.form.is_block), None):
        _resolved([module.ditfast_swap.form for module in fused], asked, block)  # before anything is undone
    restore(model)
    taken, left = _recognized(model)
    blocks = [part for part in taken if part.form.is_block]
    if not blocks:
        raise ValueError(f"accelerate: no block of this {type(model).__name__} can be taken over{_why(model, left)}")
    backends = _resolved([part.form for part in taken], asked, blocks[0].module)
    for part in taken:
        mine = tuple((op, asked[op]) for op in part.form.ops if op in asked)
        part.module.__class__ = swapped_class(Swap(part.form, type(part.module), mine))
    weight = next(blocks[0].module.parameters())
    return Report(model, tuple(taken), left, backends, weight.device, weight.dtype)


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every module gets its class back. Returns how many did; on other models that is 0.

    Raises ValueError where a module's class was changed since, by fully_shard for instance; nothing is undone then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"restore: model is a {type(model).__name__}, expected a torch.nn.Module")
    swapped: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, Swapped)]
    for path, module in swapped:
        if "ditfast_swap" not in vars(type(module)):
            raise ValueError(
                f"restore: {path or 'the model'} was made a {type(module).__name__} after accelerate (by fully_shard, "
                "for instance); undo that first, or restore before it"
            )
    for _, module in swapped:
        module.__class__ = module.ditfast_swap.base
    return len(swapped)


def _asked(backend: str | Mapping[str, str]) -> dict[str, str]:
    """The backends that are not "auto", by op."""
    if not isinstance(backend, str | Mapping):
        raise ValueError(f"accelerate: backend is {backend!r}, expected a name such as 'auto', or {{op: name}}")
    ops = {op for form in FORMS for op in form.ops}
    asked = dict.fromkeys(ops, backend) if isinstance(backend, str) else dict(backend)
    if unknown := sorted(asked.keys() - ops):
        raise ValueError(
            f"accelerate: backend names {', '.join(unknown)}; ops of accelerated models are {', '.join(sorted(ops))}"
        )
    return {op: name for op, name in asked.items() if name != "auto"}


def _resolved(forms: Iterable[type[Form]], asked: Mapping[str, str], block: nn.Module) -> dict[str, str]:
    """The backend of every op of these forms, for weights as `block` has them; BackendError for one that cannot run."""
    weight = next(block.parameters())
    names = dict.fromkeys(op for form in forms for op in form.ops)
    return {op: kernels.backend_of(op, weight.device, weight.dtype, asked.get(op, "auto")) for op in names}


def _recognized(model: nn.Module) -> tuple[list[Taken], dict[str, str]]:
    """What can be taken over; and of the rest that is of a known kind, why not, by path."""
    taken, left, compared = list[Taken](), dict[str, str](), dict[Any, str | None]()
    for path, module in model.named_modules():
        form = next((form for form in FORMS if form.is_kind(module)), None)
        if form is None:
            continue
        if not (problem := _unfit(form, module)):
            key = form, signature(module)
            if key not in compared:
                compared[key] = difference(form, module)
            problem = compared[key]
        if problem:
            left[path] = problem
        else:
            taken.append(Taken(path, module, form))
    return taken, left


def _unfit(form: type[Form], module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the module itself"
    extra = [name for name, child in module.named_children() if not isinstance(child, nn.Identity)]
    if extra := [name for name in extra if name not in form.required | form.allowed]:
        return f"it also has {', '.join(extra)}"
    return form.unfit(module)


def _why(model: nn.Module, left: Mapping[str, str]) -> str:
    own = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("ditfast.layers")}
    if own:
        return ": it is made of ditfast's layers, which are fused already"
    blocks = [path for path in left if any(f.is_block and f.is_kind(model.get_submodule(path)) for f in FORMS)]
    if blocks:
        first = {left[path]: path for path in reversed(blocks)}
        return ": " + "; ".join(f"{path}: {reason}" for reason, path in first.items())
    return f"; supported are {SUPPORTED}"
