"""Whether a module may be computed without being called: fused ops read weights and skip what hangs on modules."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """True if calling `module` is no more than the forward of one of `kinds`.

    False for a wrapper or subclass (recompute, LoRA, quantization), a patched forward, `module.compile()` and hooks:
    those must be called as they are, and the caller takes the unfused, official path.
    """
    changed = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return type(module) in kinds and not has_hooks(module) and not changed
