"""Bytes of activations between forward and backward, from a model's shapes: the one formula behind every estimate."""

import torch

from ditfast.kernels.attention.libraries import groups_fuse
from ditfast.layers.architecture import Architecture
from ditfast.layers.recompute import policy_of_block
from ditfast.layers.transformer import DiffusionTransformer

# How many tensors (tokens, D) a block leaves behind, of the residual stream's dtype and of the one that GEMMs compute
# in, without qkv and what the MLP's first linear makes: under the policy `ops`, and under `none` with kernels.
KEPT = {
    "adaln_zero": ((1, 3), (2, 5)),
    "adaln_zero_no_shift": ((1, 3), (2, 5)),
    "adaln": ((1, 3), (2, 3)),
    "cross_attention": ((3, 3), (3, 6)),
    "in_context": ((2, 1), (2, 3)),
}


def block_bytes(
    architecture: Architecture, policy: str, stream: torch.dtype, compute: torch.dtype, fused: bool
) -> float:
    """Bytes per token that a block leaves behind its forward under none, ops, mlp or block.

    `fused` says that norms and activations run on kernels, as on a GPU: their PyTorch form keeps more under `none`.
    Left out, being below a hundredth at DiT's sizes: statistics of norms and attention, and tensors (B, D). And what
    below sm_80 comes on top in 16 bits where kv_heads are fewer: k and v repeated, as they are in float32 on any GPU.
    """
    a, d = architecture, architecture.hidden_size
    if policy == "block":
        return d * stream.itemsize
    streams, width = KEPT[a.block][policy == "none"]
    hidden = 2 * a.mlp_width if a.mlp == "swiglu" else a.mlp_width
    total = d * (streams * stream.itemsize + width * compute.itemsize)
    total += hidden * compute.itemsize if policy != "mlp" else 0
    if a.kv_heads not in (None, a.num_heads) and not (fused and groups_fuse(compute, a.head_dim)):
        total += 2 * d * compute.itemsize  # k and v repeated
    if policy != "none":
        return total + _qkv(a) * compute.itemsize
    total += _qkv_and_prepared(a, stream, compute, fused)
    if not fused:
        total += 2 * a.mlp_width * compute.itemsize if a.mlp == "swiglu" else a.mlp_width * compute.itemsize
        if a.adaptive:
            # What is modulated, with a weight what that multiplies; PyTorch's RMSNorm keeps its input in float32.
            total += 2 * d * (1 + a.norm.weight) * stream.itemsize
            total += 2 * d * (4 - stream.itemsize) if a.norm.kind == "rms" else 0
    return total


def _qkv(a: Architecture) -> int:
    """Numbers per token of q, k and v."""
    return a.qkv_heads * a.head_dim


def _qkv_and_prepared(a: Architecture, stream: torch.dtype, compute: torch.dtype, fused: bool) -> int:
    """Bytes per token of qkv and of what attention's `_prepare` makes of it on the way to the attention op."""
    qkv = _qkv(a) * compute.itemsize
    if not (a.rope or a.qk_norm):
        return qkv
    if fused:
        return 2 * qkv
    if a.qk_norm is None:
        return qkv
    normed = _qkv(a) - (a.kv_heads or a.num_heads) * a.head_dim
    if a.qk_norm.kind == "rms":
        return qkv + 2 * 4 * normed  # the input and what the weight multiplies, in float32
    return qkv + (qkv if stream == compute else 4 * normed)


def activation_bytes(
    model: DiffusionTransformer,
    policy: str,
    batch_size: int,
    stream: torch.dtype,
    compute: torch.dtype,
    fused: bool = True,
) -> float:
    """Bytes that the blocks of `model` leave behind the forward of a batch under a policy of its `recompute`.

    While a block's backward runs, about what it keeps under `none` comes on top. ValueError for an unknown policy.
    """
    tokens = batch_size * (model.x_embedder.num_patches + (2 if model.block == "in_context" else 0))
    policies = [policy_of_block(policy, i) for i in range(len(model.blocks))]
    return tokens * sum(block_bytes(model.architecture, p, stream, compute, fused) for p in policies)
