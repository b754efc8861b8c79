"""Bytes of activations between forward and backward, from a model's shapes: the one formula behind every estimate."""

import torch

from ditfast.layers.dit import DiT
from ditfast.layers.recompute import policy_of_block

# How many tensors (tokens, D) a block leaves behind, of the residual stream's dtype and of the one that GEMMs compute
# in, without fc1's output: under the policy `ops`, and under `none` with kernels.
KEPT = {
    "adaln_zero": ((1, 6), (2, 8)),
    "adaln": ((1, 6), (2, 6)),
    "cross_attention": ((3, 6), (3, 9)),
    "in_context": ((2, 4), (2, 6)),
}


def block_bytes(
    block: str, policy: str, hidden_size: int, mlp_ratio: float, stream: torch.dtype, compute: torch.dtype, fused: bool
) -> float:
    """Bytes per token that a block of this variant leaves behind its forward under none, ops, mlp or block.

    `fused` says that norms and GELU run on kernels, as on a GPU: their PyTorch form keeps more under `none`.
    Left out, being below a hundredth at DiT's sizes: statistics of norms and attention, and tensors (B, D).
    """
    if policy == "block":
        streams, others = 1, 0.0
    else:
        (streams, width), fc1 = KEPT[block][policy == "none"], 0 if policy == "mlp" else mlp_ratio
        others = width + fc1
        if policy == "none" and not fused:
            streams += 2 if block.startswith("adaln") else 0  # the norms before their modulation
            others += mlp_ratio  # GELU's output
    return hidden_size * (streams * stream.itemsize + others * compute.itemsize)


def activation_bytes(
    model: DiT, policy: str, batch_size: int, stream: torch.dtype, compute: torch.dtype, fused: bool = True
) -> float:
    """Bytes that the blocks of `model` leave behind the forward of a batch under a policy of `DiT.recompute`.

    While a block's backward runs, about what it keeps under `none` comes on top. ValueError for an unknown policy.
    """
    tokens = batch_size * (model.x_embedder.num_patches + (2 if model.block == "in_context" else 0))
    width = model.pos_embed.shape[-1]
    ratio = model.blocks[0].mlp.fc1.out_features / width
    policies = [policy_of_block(policy, i) for i in range(len(model.blocks))]
    each = [block_bytes(model.block, p, width, ratio, stream, compute, fused) for p in policies]
    return tokens * sum(each)
