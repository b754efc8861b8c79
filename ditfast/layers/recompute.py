"""Recompute policies: what a block keeps between its forward and its backward, and what it computes again.

none      what its ops save by themselves
ops       without norms, modulation, rotation, gates and activations, which cost bandwidth alone: x, and the results of
          qkv, attention, proj and the MLP's two linears
mlp       without the first of these two as well
block     x alone
block:k   `block` for every k-th block, `ops` for the others

Gradients are the same bits under every policy, with one exception: over Triton kernels `block` ends a block in an op of
its own, where the others share one with the next block, and sums round once more. memory.py has the bytes.

Eagerly, `ops` and `mlp` replay single ops (replay.py), a norm of a kept stream once for each op that saved it: twice
where LoRA's and a trained weight both did. Nothing else is called twice, so hooks, LoRA, dropout and wrapped modules
inside a block work, and what they save is kept. Selective checkpointing keeps the same bytes, but it interprets every
PyTorch op in Python, in both directions: on a CPU 6 to 7 % of a step of DiT-S/2, where replay costs 0 to 2 %.
torch.compile cannot trace replay's hooks; it gets selective checkpointing, which costs nothing there.
"""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ditfast import kernels
from ditfast.kernels._op import Kernels
from ditfast.layers.attention import Attention, CrossAttention, Rope
from ditfast.layers.mlp import FeedForward, Mlp, SwiGlu
from ditfast.layers.norm import Norm
from ditfast.layers.plain import is_plain
from ditfast.layers.replay import Replays, call

RECOMPUTE_POLICIES = ("none", "ops", "mlp", "block")
_PLAIN = (Attention, CrossAttention, Mlp, SwiGlu, Norm, nn.Linear, nn.LayerNorm, nn.Sequential, nn.SiLU)
_GEMMS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def policy_of_block(policy: str, index: int) -> str:
    """Which of RECOMPUTE_POLICIES a model's `policy`, one of these or "block:k", means for its block `index`, from 0.

    ValueError for any other policy.
    """
    name, colon, every = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    if colon and name == "block" and every.isdecimal() and int(every) > 0:
        return "block" if (index + 1) % int(every) == 0 else "ops"
    if policy not in RECOMPUTE_POLICIES:
        expected = ", ".join(RECOMPUTE_POLICIES)
        raise ValueError(f"recompute must be one of {expected}, or block:k for every k-th block, got {policy!r}")
    return policy


class Block(nn.Module):
    """What all blocks share: a recompute policy, one of RECOMPUTE_POLICIES."""

    attn: nn.Module
    mlp: nn.Module
    _recompute = "none"

    @property
    def recompute(self) -> str:
        return self._recompute

    @recompute.setter
    def recompute(self, policy: str) -> None:
        if policy not in RECOMPUTE_POLICIES:
            raise ValueError(f"recompute of a block must be one of {', '.join(RECOMPUTE_POLICIES)}, got {policy!r}")
        self._recompute = policy
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.recompute = policy == "mlp"

    @property
    def recompute_now(self) -> str:
        """The policy in force: without gradients nothing is kept anyway."""
        return self._recompute if torch.is_grad_enabled() else "none"

    def under_policy(self, body: Callable[..., Any], *args: Any) -> Any:
        """body(call, *args), of which as much is kept for the backward as the policy in force says.

        `body` runs what is cheap to redo as `call(fn, *inputs, drop=...)`, see `Replays.call`.
        """
        policy = self.recompute_now
        if policy == "none":
            return body(call, *args)
        if policy == "block" or torch.compiler.is_compiling():
            context = {} if policy == "block" else {"context_fn": partial(_selective, self._dropped_gemms())}
            # Plain blocks draw no random numbers, and a CUDA graph cannot hold what saves the generator's state.
            draws = not all(is_plain(module, *_PLAIN, type(self)) for module in self.modules())
            return checkpoint(partial(body, call), *args, use_reentrant=False, preserve_rng_state=draws, **context)
        with (replays := Replays()):
            return body(replays.call, *args)

    def attend(self, y: Any, rope: Rope | None, run: Callable[..., Any]) -> Any:
        """The self-attention of y; one with hooks, or another module in its place, is called as it is."""
        if is_plain(self.attn, Attention):
            return self.attn.forward(y, rope, run)
        return self.attn(y) if rope is None else self.attn(y, rope)

    def feed(self, y: Any, run: Callable[..., Any]) -> Any:
        """The MLP of y; one with hooks, or another module in its place, is called as it is."""
        return self.mlp.forward(y, run) if is_plain(self.mlp, Mlp, SwiGlu) else self.mlp(y)

    def _dropped_gemms(self) -> range:
        """Which matrix products of the block's forward, counted from 0, `mlp` computes again: the MLP's first."""
        linears = [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and "adaLN_modulation" not in n]
        first = next((f"mlp.{name}" for name in ("fc1", "w12") if f"mlp.{name}" in linears), None)
        if self._recompute != "mlp" or first is None:
            return range(0)
        # On the library's GEMMs SwiGLU's first product is two.
        return range(linears.index(first), linears.index(first) + (2 if _halved(self.mlp) else 1))


def _halved(mlp: nn.Module) -> bool:
    """Whether this is a SwiGLU whose op multiplies with the halves of its first weight."""
    if not (isinstance(mlp, SwiGlu) and mlp.plain):
        return False
    weight = mlp.w12.weight
    return kernels.backend_of(mlp.op, weight.device, weight.dtype) != "reference"


@cache
def _redone() -> frozenset[Any]:
    """The raw ops all of whose results a policy may drop."""
    return frozenset(
        getattr(torch.ops.ditfast, f"{spec.name}_fwd").default
        for spec in kernels.OPS
        if isinstance(spec.op.kernels, Kernels) and set(spec.op.kernels.outputs) <= set(spec.recompute or ())
    )


def _selective(dropped_gemms: range) -> Any:
    """Contexts of a selective checkpoint: matrix products but these, attention, and foreign ops are kept."""
    gemms = itertools.count()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _GEMMS:
            kept = next(gemms) not in dropped_gemms
        elif op.namespace == "aten":
            kept = "scaled_dot_product" in op._schema.name
        else:
            kept = op not in _redone()
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
