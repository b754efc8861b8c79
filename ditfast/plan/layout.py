"""How a model may be spread over GPUs: memory of each, communication, step time, and which layout is proposed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ditfast.config import ConfigError, Precision
from ditfast.hardware import Ceilings, Gpu
from ditfast.layers import DiffusionTransformer, policy_of_block
from ditfast.plan.memory import POLICIES, policy_memory, state, trainable
from ditfast.plan.step import Factor, Share, StepTime, rates, step_time

FACTORS = {
    "link": Factor(0.80, "NCCL's bus bandwidth over NVLink's datasheet (estimate)"),
    "network": Factor(0.85, "NCCL's bus bandwidth between nodes over the adapter's (estimate)"),
    "hidden": Factor(
        0.90, "of the gradients' and weights' communication, if the work beside it lasts: the last bucket"
    ),
    "same": Factor(0.02, "a simpler layout is kept unless another is faster by more than this"),
    "latency": Factor(20e-6, "seconds of a collective of tensor or sequence parallelism (estimate)"),
    "reserve": Factor(1.5e9, "bytes of the CUDA context, and of cuBLAS' and NCCL's workspaces (estimate)"),
    "sequence": Factor(
        4096, "tokens of an image from which sequence parallelism is worth its communication (estimate)"
    ),
}


@dataclass(frozen=True)
class Layout:
    """Ways to split a step: `data` replicas, each of `tensor` or `sequence` GPUs that share its images.

    shard: what the replicas share instead of keeping it whole: "none", "optimizer" (its state and the EMA; ZeRO-1),
    or "full" (weights and gradients as well; FSDP).
    """

    data: int
    shard: str = "none"
    tensor: int = 1
    sequence: int = 1

    @property
    def parts(self) -> int:
        return self.tensor * self.sequence

    @property
    def replicas(self) -> int:
        """GPUs that hold the same weights, and sum their gradients or share what is sharded."""
        return self.data * self.sequence

    @property
    def runs(self) -> bool:
        """Whether ditfast can train so today: on one GPU, or plain data parallel."""
        return self.shard == "none" and self.parts == 1

    def __str__(self) -> str:
        words = [f"data {self.data}"] if self.data > 1 or self.parts == 1 else []
        words += [f"{name} {n}" for name, n in (("tensor", self.tensor), ("sequence", self.sequence)) if n > 1]
        return ", ".join(words + ([] if self.shard == "none" else [f"{self.shard} sharded"]))


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, `per_node` in a node. ConfigError for counts that do not fit each other."""

    gpu: Gpu
    gpus: int
    per_node: int
    ceilings: Ceilings
    network: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--gpus", self.gpus), ("--gpus-per-node", self.per_node)):
            if value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ConfigError(
                f"--gpus {self.gpus} must be a multiple of --gpus-per-node {self.per_node}, or fit in one"
            )
        if self.nodes > 1 and not self.between_nodes:
            raise ConfigError(
                f"the datasheet of {self.gpu.name} names no network; give --network, GB/s of each GPU to other nodes"
            )
        if self.network is not None and not self.network > 0:
            raise ConfigError(f"--network must be positive GB/s, got {self.network}")

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.per_node)

    @property
    def between_nodes(self) -> float:
        """GB/s of one GPU to other nodes, 0 where there is no saying."""
        return self.network if self.network is not None else self.gpu.network or 0.0


@dataclass(frozen=True)
class Job:
    """What is trained: a model (on meta), by images of all GPUs a step; ConfigError for impossible counts."""

    model: DiffusionTransformer
    precision: Precision
    batch_size: int = 256
    accumulate: int = 1
    emas: int = 1

    def __post_init__(self) -> None:
        for name, value in (("--batch-size", self.batch_size), ("accumulation", self.accumulate)):
            if value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")

    @property
    def tokens(self) -> int:
        return self.model.x_embedder.num_patches


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU: weights, gradients, optimizer (masters, moments), EMAs, kept activations, what a block at work
    adds, and buffers (autocast's copies, gathered shards).
    """

    weights: float
    gradients: float
    optimizer: float
    emas: float
    activations: float
    working: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Candidate:
    """A layout with its policy, or with the reason why it cannot be (`why`); then `time` and `memory` may be None.

    communicated: bytes that a GPU sends in a step. hidden: milliseconds of communication beside other work.
    """

    layout: Layout
    policy: str = ""
    memory: Memory | None = None
    time: StepTime | None = None
    communicated: float = 0.0
    hidden: float = 0.0
    why: str = ""

    @property
    def fits(self) -> bool:
        return not self.why


def layouts(cluster: Cluster) -> Iterator[Layout]:
    """The layouts to choose from, the simplest first. Tensor and sequence parallel GPUs share a node."""
    gpus, node = cluster.gpus, min(cluster.gpus, cluster.per_node)
    yield Layout(gpus)
    if gpus > 1:
        yield Layout(gpus, "optimizer")
        yield Layout(gpus, "full")
    for splits_weights in (True, False):
        for parts in (n for n in range(2, node + 1) if node % n == 0):
            tensor, sequence = (parts, 1) if splits_weights else (1, parts)
            yield Layout(gpus // parts, "optimizer" if gpus > tensor else "none", tensor, sequence)


def weigh(job: Job, cluster: Cluster, layout: Layout, policies: tuple[str, ...] = POLICIES) -> Candidate:
    """A layout with the policy that costs the least of those that fit into memory, or with the reason why none does."""
    if why := obstacle(job, layout):
        return Candidate(layout, why=why)
    room = cluster.gpu.memory * 1e9 - FACTORS["reserve"].value
    weighed = [_with_policy(job, cluster, layout, policy) for policy in policies]
    fitting = [each for each in weighed if each.memory and each.memory.total <= room]
    if not fitting:
        least = min(weighed, key=lambda each: each.memory.total if each.memory else 0)
        needed = (least.memory.total + FACTORS["reserve"].value) / 1e9 if least.memory else 0
        even = f" even with recompute {least.policy}" if len(policies) > 1 else ""
        return replace(least, why=f"needs {needed:.1f} GB of {cluster.gpu.memory:g}{even}")
    return min(fitting, key=lambda each: each.time.total - each.time.communication if each.time else 0)


def obstacle(job: Job, layout: Layout) -> str:
    """Why a layout cannot be for this job's shapes, or ""."""
    heads, images = job.model.num_heads, job.batch_size / job.accumulate
    if heads % layout.parts:
        return f"{heads} heads cannot be split by {layout.parts}"
    if job.tokens % layout.parts:
        return f"{job.tokens} tokens cannot be split by {layout.parts}"
    if images % layout.data:
        return f"{images:g} images at a time cannot be split by {layout.data}"
    return ""


def choose(job: Job, candidates: list[Candidate]) -> Candidate | None:
    """The fastest, or a simpler one that is hardly slower; None if nothing fits.

    Sequence parallel only for long sequences, or where nothing else fits.
    """
    fitting = [(each, each.time.total) for each in candidates if each.fits and each.time]
    usual = [pair for pair in fitting if pair[0].layout.sequence == 1 or job.tokens >= FACTORS["sequence"].value]
    fitting = usual or fitting
    fastest = min((total for _, total in fitting), default=0.0)
    return next((each for each, total in fitting if total <= fastest * (1 + FACTORS["same"].value)), None)


def _with_policy(job: Job, cluster: Cluster, layout: Layout, policy: str) -> Candidate:
    images = job.batch_size // job.accumulate // layout.data
    share = Share(
        images, job.accumulate, layout.parts, layout.tensor, optimizer=1 if layout.shard == "none" else layout.replicas
    )
    reached = rates(cluster.ceilings, job.precision)
    time = step_time(job.model, job.precision, policy, share, reached, job.emas)
    sent, exposed, hidden = _communication(job, cluster, layout, policy, time, images)
    memory = memory_of(job, layout, policy, images)
    return Candidate(layout, policy, memory, replace(time, communication=exposed), sent, hidden)


def memory_of(job: Job, layout: Layout, policy: str, images: int) -> Memory:
    """Memory of one GPU with `images` at a time."""
    held, kept = state(job.model, job.precision, job.emas), policy_memory(job.model, job.precision, policy, images)
    whole = layout.tensor * (layout.replicas if layout.shard == "full" else 1)
    sharded = layout.tensor * (1 if layout.shard == "none" else layout.replicas)
    buffers = held.copies / layout.tensor
    if layout.shard == "full":
        # Of two blocks, one at work and one on its way, weights and gradients are gathered; no copies of all.
        each = trainable(job.model) * (job.precision.compute.itemsize + job.precision.grads.itemsize)
        buffers = 2 * each / len(job.model.blocks)
    return Memory(
        weights=held.weights / whole,
        gradients=held.gradients / whole,
        optimizer=(held.masters + held.moments) / sharded,
        emas=held.emas / sharded,
        activations=kept.activations / layout.parts,
        working=kept.working / layout.parts,
        buffers=buffers,
    )


def _communication(
    job: Job, cluster: Cluster, layout: Layout, policy: str, time: StepTime, images: int
) -> tuple[float, float, float]:
    """(bytes that a GPU sends in a step, milliseconds that nothing hides, milliseconds beside other work)."""
    p, count = job.precision, trainable(job.model) / layout.tensor
    gradients, weights, computed = (count * dtype.itemsize for dtype in (p.grads, p.params, p.compute))
    # (bytes that all cross, milliseconds of the work beside them): of what is not the update, which waits for the
    # gradients, the forward is a third and the backward the rest. What is reduced or gathered whole once a step has
    # one chunk's beside it, the last backward or the first forward; what is fully sharded crosses in every chunk.
    chunks = time.total - time.optimizer
    forward, backward = chunks / 3 / job.accumulate, chunks * 2 / 3 / job.accumulate
    moved = {
        "none": [(2 * gradients, backward)],
        "optimizer": [(gradients, backward), (weights, forward)],
        "full": [
            (job.accumulate * (gradients + computed), job.accumulate * backward),
            (job.accumulate * computed, job.accumulate * forward),
        ],
    }[layout.shard]
    node = min(cluster.gpus, cluster.per_node)
    inner = node // layout.tensor
    sent = exposed = hidden = 0.0
    for size, beside in moved if layout.replicas > 1 else []:
        bytes_sent, seconds = _ring(size, inner, layout.replicas // inner, cluster, node)
        beside = min(1e3 * seconds * FACTORS["hidden"].value, beside)
        sent, hidden, exposed = sent + bytes_sent, hidden + beside, exposed + 1e3 * seconds - beside
    if layout.parts > 1:
        # Tensor parallel: two sums of the stream a block and direction; sequence parallel: q, k, v there, o back.
        stream = images * job.tokens * job.model.architecture.hidden_size * p.compute.itemsize
        ways = 2 + _whole_blocks(policy, len(job.model.blocks))
        each = 4 * stream if layout.tensor > 1 else 4 * stream / layout.parts
        size = each * ways * len(job.model.blocks) * job.accumulate
        bytes_sent, seconds = _ring(size, layout.parts, 1, cluster, layout.parts)
        seconds += 4 * ways * len(job.model.blocks) * job.accumulate * FACTORS["latency"].value
        sent, exposed = sent + bytes_sent, exposed + 1e3 * seconds
    return sent, exposed, hidden


def _whole_blocks(policy: str, blocks: int) -> float:
    """The share of the blocks that are computed again whole, with their communication."""
    return [policy_of_block(policy, i) for i in range(blocks)].count("block") / blocks


def _ring(size: float, inner: int, outer: int, cluster: Cluster, span: int) -> tuple[float, float]:
    """(bytes sent, seconds) of a GPU where all of `size` bytes cross once: in a node, and a share of it between nodes.

    Both go on at a time, chunk by chunk. The GPUs of a node that take part are among `span` neighbours.
    """
    within, between = size * (inner - 1) / inner, size / inner * (outer - 1) / outer
    seconds = within / (1e9 * cluster.gpu.link_among(span) * FACTORS["link"].value)
    if between:
        seconds = max(seconds, between / (1e9 * cluster.between_nodes * FACTORS["network"].value))
    return within + between, seconds
