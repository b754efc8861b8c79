"""What the benches compare an op with: plain PyTorch, torch.compile of it, and libraries, imported when first called.

A peer takes the keyword arguments of the op's function, but for `backend`, and gives its results or writes in place.
PeerError says which library is missing, or what of these arguments it cannot do.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from .. import parity
from ..spec import OpSpec
from ._base import PeerError
from .embeddings import diffusers_patchify, diffusers_timestep_embedding
from .heads import (
    flash_attn_qk_norm_rope,
    liger_qk_norm_rope,
    transformer_engine_attention,
    transformer_engine_qkvpacked,
)
from .mlp import (
    apex_gelu_mlp,
    diffusers_gelu_mlp,
    flash_attn_gelu_mlp,
    liger_swiglu_mlp,
    xformers_swiglu_mlp,
)
from .norms import after_residual, apex_modulated_norm, liger_modulated_norm
from .optimizer import apex_adamw, torch_adamw, transformer_engine_adamw

Peer = Callable[..., Any]


def peers_of(spec: OpSpec) -> dict[str, Peer]:
    """Every peer of an op by name: "eager", "compile" unless it works in place, and the spec's own."""
    eager = partial(spec.fn, backend="reference")
    # Of an op in place over hundreds of tensors torch.compile makes one graph for minutes, which nobody would run.
    return {"eager": eager} | ({} if spec.mutates else {"compile": _compiled(spec.fn)}) | dict(spec.peers or {})


def _compiled(fn: Peer) -> Peer:
    """torch.compile of fn's reference, made at the first call: making it imports the compiler."""

    @cache
    def made() -> Peer:
        return torch.compile(fn, fullgraph=True, dynamic=False)

    return lambda **inputs: made()(**inputs, backend="reference")


def as_backend(spec: OpSpec, peer: Peer) -> OpSpec:
    """The spec with a peer in place of the op's function, for parity.py to judge; its `backend` is ignored."""
    return replace(spec, fn=lambda *, backend, **inputs: peer(**inputs))


def judge_peer(truth: parity.Truth, peer: Peer) -> list[parity.Verdict]:
    """The verdicts on a peer: twice the errors of the eager reference on the inputs as they come, 16 times in float32.

    There all errors are those of sums in another order, and what is wrong shows a thousand times over.
    """
    spec, inputs, douts = truth.spec, truth.inputs, truth.douts
    results = parity.run(as_backend(spec, peer), inputs, "", douts)
    eager = parity.run(spec, inputs, "reference", douts)
    eager = {name: value.to(results[name].dtype) for name, value in eager.items()}
    slack = spec.slack(inputs) if spec.slack else None
    verdicts = parity.judge(results, eager, truth.exact, library=True, slack=slack)
    return [
        replace(v, max_allowed=8 * v.max_allowed, rms_allowed=8 * v.rms_allowed)
        if results[v.name].dtype == torch.float32
        else v
        for v in verdicts
    ]


__all__ = [
    "PeerError",
    "after_residual",
    "apex_adamw",
    "apex_gelu_mlp",
    "apex_modulated_norm",
    "as_backend",
    "diffusers_gelu_mlp",
    "diffusers_patchify",
    "diffusers_timestep_embedding",
    "flash_attn_gelu_mlp",
    "flash_attn_qk_norm_rope",
    "judge_peer",
    "liger_modulated_norm",
    "liger_qk_norm_rope",
    "liger_swiglu_mlp",
    "peers_of",
    "torch_adamw",
    "transformer_engine_adamw",
    "transformer_engine_attention",
    "transformer_engine_qkvpacked",
    "xformers_swiglu_mlp",
]
