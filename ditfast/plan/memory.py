"""Memory of a training run, in bytes: its state, and the activations of every recompute policy."""

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
    return [policy_memory(model, precision, policy, batch_size, fused) for policy in POLICIES]


def policy_memory(
    model: DiffusionTransformer, precision: Precision, policy: str, batch_size: int, fused: bool = True
) -> MemoryPlan:
    """The row of one policy; ValueError for one that is none."""
    layers, tokens = len(model.blocks), batch_size * model.x_embedder.num_patches
    kept, all_kept = (
        activation_bytes(model, p, batch_size, precision.stream, precision.compute, fused) for p in (policy, "none")
    )
    return MemoryPlan(policy, kept / tokens / layers, kept, all_kept / layers)


@dataclass(frozen=True)
class State:
    """Bytes of what lives as long as a run: weights, gradients, and the optimizer's part, by what holds them.

    `masters` are the optimizer's fp32 weights where they are apart from the model's, `copies` autocast's of the
    weights: at most, since what a policy computes again copies its weights again.
    """

    weights: float
    gradients: float
    moments: float
    masters: float
    emas: float
    copies: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def optimizer(self) -> float:
        """What a sharded optimizer shards: masters, AdamW's moments and the EMAs."""
        return self.masters + self.moments + self.emas


def trainable(model: DiffusionTransformer) -> int:
    """How many numbers the optimizer updates."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def state(model: DiffusionTransformer, precision: Precision, emas: int = 1) -> State:
    """The state of a run on one device."""
    p, count = precision, trainable(model)
    return State(
        weights=count * p.params.itemsize,
        gradients=count * p.grads.itemsize,
        moments=2 * count * p.optimizer.itemsize,
        masters=count * p.optimizer.itemsize if p.params is not p.optimizer else 0,
        emas=emas * count * p.ema.itemsize,
        copies=count * p.compute.itemsize if p.compute is not p.params else 0,
    )
