"""What a training run needs, computed before it starts: memory of every recompute policy."""

from dataclasses import dataclass

from ditfast.config import Precision
from ditfast.layers import RECOMPUTE_POLICIES, DiffusionTransformer, activation_bytes

POLICIES = (*RECOMPUTE_POLICIES, "block:2", "block:4")


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one policy, in bytes: activations per token and layer, of all of a batch, and of one block.

    `activations` is alive between forward and backward; during a block's backward about `working` comes on top.
    """

    policy: str
    per_token: float
    activations: float
    working: float


def plan_memory(
    model: DiffusionTransformer, precision: Precision, batch_size: int, fused: bool = True
) -> list[MemoryPlan]:
    """A row for every recompute policy, for the batch of one device; `model` may be on the meta device."""
    layers = len(model.blocks)
    tokens = batch_size * model.x_embedder.num_patches

    def kept(policy: str) -> float:
        return activation_bytes(model, policy, batch_size, precision.stream, precision.compute, fused)

    return [MemoryPlan(p, kept(p) / tokens / layers, kept(p), kept("none") / layers) for p in POLICIES]


def state_bytes(model: DiffusionTransformer, precision: Precision, emas: int = 1) -> int:
    """Bytes of what lives as long as the run: weights, gradients, AdamW's moments, masters where they are apart, EMAs.

    Under autocast also its copies of the weights: at most, since what a policy computes again copies its weights again.
    """
    p = precision
    each = p.params.itemsize + p.grads.itemsize + 2 * p.optimizer.itemsize + emas * p.ema.itemsize
    each += p.optimizer.itemsize if p.params is not p.optimizer else 0
    each += p.compute.itemsize if p.compute is not p.params else 0
    return each * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
