"""The training step of every family: against its peers, and per recompute policy with and without a CUDA graph.

Timed is what `Trainer.learn` does, from a batch on the device to updated weights and EMA. Where there is a GPU to
sample, each provider then runs once more by itself for its power.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import FLOAT64, Baseline
from bench.contest import Contest, Settings
from bench.exactness import Truth, each_of
from bench.oracles import Recipe
from bench.power import Sampler
from bench.rows import COMPILE, DITFAST, EAGER, Job, Row
from bench.suites import Options
from bench.timing import Timing
from bench.training import SizedJob, label, random_batch, run_config, trainer_for
from bench.update import Update
from ditfast.config import ConfigError, Precision, TrainConfig
from ditfast.cuda_graph import WARMUP, CudaGraph, check_cuda_graph
from ditfast.distributed import World
from ditfast.kernels.peers import PeerError
from ditfast.layers import training_flops
from ditfast.logs import peak_flops
from ditfast.train import Trainer

GRAPH = f"{DITFAST} graph"
PEERS = {
    EAGER: Recipe(sdpa=True),
    COMPILE: Recipe(sdpa=True, compiled=True),
    "fast-DiT": Recipe(sdpa=True, checkpointed=True, plain_loop=True),
}
# The oracle, in pieces and without what attention keeps, so that float64 fits beside the rest: images at a time.
ORACLE, CHUNK = Recipe(checkpointed=True), 8


@dataclass(frozen=True)
class TrainingJob(SizedJob):
    """A size's training step: under the default recompute policy with its peers, or under the one named, alone."""

    recompute: str | None = None
    compile: bool = True

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        name, dtype = label(self.model, self.precision)
        name += f" recompute={self.recompute}" if self.recompute else ""
        return "model", name, dtype, f"{self.pixels} px, batch {self.batch}"

    def measure(self, settings: Settings) -> list[Row]:
        """The rows."""
        policy = self.recompute or TrainConfig.recompute
        config, world = run_config(self.model, self.pixels), World(0, 1, self.device)
        with trainer_for(
            config.model, self.batch, self.precision, world, transport=config.transport, recompute=policy
        ) as t:
            return self.contest(t, settings.seconds).measure(settings)

    def contest(self, trainer: Trainer, seconds: float) -> Contest:
        """The contest, whose power is sampled for `seconds` each."""
        steps = Steps(trainer, random_batch(trainer.config.model, self.batch, self.device))
        others = [GRAPH] if self.recompute else [name for name in PEERS if self.compile or name != COMPILE]
        runs = {name: partial(steps.run, name) for name in (DITFAST, *others)}
        flops, policy = training_flops(trainer.model) * self.batch, trainer.config.precision
        peak = peak_flops(self.device, policy)

        def details(provider: str, timing: Timing) -> dict[str, Any]:
            return {
                "images_per_s": 1e3 * self.batch / timing.ms,
                "steps_per_s": 1e3 / timing.ms,
                "mfu": 1e3 * flops / timing.ms / peak if peak else None,
                "cuda_graph": provider == GRAPH,
                "state_bytes": distinct_bytes(state_of(steps.training(provider))),
                "recompute": trainer.config.train.recompute if provider.startswith(DITFAST) else None,
                **power_of(runs[provider], self.batch, timing, seconds, self.device),
            }

        extra = {
            "batch": self.batch,
            "precision": self.precision,
            "process": trainer.config.process,
            "network": asdict(trainer.config.model),
        }
        return Contest(*self.job, runs, steps.check, flops=flops, extra=extra, details=details, wall=True)


class Steps:
    """Training steps from one batch by provider, each made when it is first asked for."""

    def __init__(self, trainer: Trainer, batch: tuple[Tensor, ...]):
        self.trainer, self.batch = trainer, batch
        self.peer, self.truth, self.graph = cache(self._peer), cache(self._truth), cache(self._graph)
        self.update = cache(self._update)

    def run(self, provider: str) -> None:
        """A whole step, to its end on the device; who runs was judged, so the oracle's gradients go."""
        self.forget()
        self.step(provider)(*self.batch)
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def step(self, provider: str) -> Callable[..., Any]:
        """What is called with the batch."""
        if provider == GRAPH:
            return self.graph()
        return self.trainer.learn if provider == DITFAST else self.peer(provider)

    def training(self, provider: str) -> Trainer | Baseline:
        """Whose step it is."""
        return self.trainer if provider in (DITFAST, GRAPH) else self.peer(provider)

    def check(self, provider: str) -> str | None:
        """None where a provider's step is within the budgets of exactness.py, else what is not."""
        return self._check_replay() if provider == GRAPH else self.judge(self.training(provider))

    def judge(self, training: Trainer | Baseline) -> str | None:
        """`check` of whose step it is: its losses and gradients, then weights, EMA and moments after an update."""
        step: Callable[..., object] = training if isinstance(training, Baseline) else training.learn
        found = training.gradients(self.batch) if isinstance(training, Baseline) else gradients(training, self.batch)
        return self.truth().judge(found) or self.update().judge(training, partial(step, *self.batch))

    def forget(self) -> None:
        """Lets go of the oracle's gradients, which are large."""
        self.truth.cache_clear()
        self.update.cache_clear()

    def _check_replay(self) -> str | None:
        """A replay's gradients are out of reach, but not the moments after it; it was recorded with other inputs."""
        x, *others = self.batch
        for _ in range(WARMUP + 1):
            self.graph()(x + 1, *others)
        terms, _, _ = self.graph()(*self.batch)
        wrong = self.truth().judge({**self.truth().eager, "losses": terms["loss"]})
        return wrong or self.update().judge(self.trainer, partial(self.graph(), *self.batch))

    def _graph(self) -> CudaGraph:
        device = self.trainer.device
        try:
            check_cuda_graph("train.cuda_graph", device, self.trainer.model)
        except ConfigError as error:
            raise PeerError(str(error)) from error
        return CudaGraph(self.trainer.learn, "train.cuda_graph", device, max_shapes=1)

    def _peer(self, provider: str) -> Baseline:
        return self._baseline(PEERS[provider], self.trainer.config.precision)

    def _baseline(self, recipe: Recipe, precision: Precision) -> Baseline:
        config, weights = self.trainer.config, self.trainer.optimizer.state_tensors()["model"]
        optim = replace(config.optim, lr=0.0)  # as the Trainer's
        return Baseline(recipe, config.model, weights, precision, optim, self.trainer.process, len(self.batch[0]))

    def _truth(self) -> Truth:
        exact = self._baseline(ORACLE, FLOAT64).gradients([_doubled(v) for v in self.batch], CHUNK)
        precision = self.trainer.config.precision
        eager = self._baseline(ORACLE, precision).gradients(self.batch, CHUNK)
        return Truth(exact, eager, each_of(precision))

    def _update(self) -> Update:
        weights = {name: w.clone() for name, w in self.trainer.optimizer.state_tensors()["model"].items()}
        return Update(weights, self.truth(), self.trainer.config.optim)


def gradients(trainer: Trainer, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a Trainer's own step of the batch computes on its way: the gradients by parameter, and "losses" (B,)."""
    scale, found = trainer.scaler.get_scale(), dict[str, Tensor]()

    def keep(name: str, p: Tensor) -> None:
        assert p.grad is not None
        found[name] = p.grad.clone() if scale == 1 else p.grad.double() / scale

    parameters = trainer.optimizer.parameters.items()
    hooks = [p.register_post_accumulate_grad_hook(partial(keep, name)) for name, p in parameters]
    try:
        terms, _, _ = trainer.learn(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {"losses": terms["loss"]} | found


def state_of(training: Trainer | Baseline) -> list[Tensor]:
    """What lives as long as a training run: weights, masters, moments, EMAs."""
    held = list[Tensor](training.model.parameters())
    if isinstance(training, Baseline):
        moments = [v for state in training.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [*held, *training.masters.values(), *training.ema.values(), *moments]
    optimizer = training.optimizer
    groups = (optimizer.masters, *optimizer.emas.values(), *optimizer.moments.values())
    return [*held, *(tensor for group in groups for tensor in group.values())]


def distinct_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def power_of(
    run: Callable[[], object], images: int, timing: Timing, seconds: float, device: torch.device
) -> Mapping[str, Any]:
    """What a run of so many images draws from the GPU, over `seconds` of it alone; nulls where nothing can be read."""
    sampler = Sampler(device)
    if sampler.absent:
        return sampler.figures(images)
    times = max(3, math.ceil(1e3 * seconds / timing.ms))
    with sampler:
        for _ in range(times):
            run()
    return sampler.figures(times * images)


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def contests(options: Options) -> Iterator[TrainingJob]:
    """Every size with its peers; its recompute policies; the other precisions."""
    job = partial(TrainingJob, device=options.device, compile=options.scale.compile)
    for model, pixels, batch, precisions, policies in JOBS[options.scale.name]:
        for precision in precisions:
            yield job(model, pixels, batch, precision)
        for precision in precisions[:2]:
            yield from (job(model, pixels, batch, precision, recompute=policy) for policy in policies)


# By scale: size, pixels, batch; precisions, the first two also by recompute policy; those policies. On a GPU of 139 GB
# four providers' states, and what the graph keeps beside what a step allocates, leave room for these batches, and for 4
# of LargeDiT-3B's 32 layers: one state of all is 93 GB in bf16, the oracle's in float64 more than that.
JOBS: dict[str, tuple[tuple[str, int, int, tuple[str, ...], tuple[str, ...]], ...]] = {
    "small": (
        ("tiny", 64, 2, ("fp32",), ("block",)),
        ("tiny SiT-S/2", 64, 2, ("fp32",), ()),
        ("tiny LightningDiT-XL/1", 64, 2, ("fp32",), ()),
        ("LargeDiT-tiny/2", 64, 2, ("fp32",), ()),
    ),
    "cpu": (
        ("DiT-S/2 of 2 layers", 256, 4, ("fp32",), ()),
        ("LargeDiT-tiny/2", 256, 4, ("fp32",), ()),
        ("SiT-S/2 of 2 layers", 256, 2, ("fp32",), ()),
        ("LightningDiT-B/1 of 2 layers", 128, 2, ("fp32",), ()),
        ("DiT-S/2 of 2 layers", 256, 4, ("bf16",), ("ops", "block", "none", "mlp")),
    ),
    "gpu": (
        ("DiT-XL/2", 256, 256, ("bf16", "bf16-fast", "fp16"), ("ops", "mlp", "block")),
        ("DiT-XL/2", 256, 64, ("bf16", "tf32", "fp32"), ("none",)),
        ("DiT-XL/2", 512, 64, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("SiT-XL/2", 256, 256, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("LightningDiT-XL/1", 256, 128, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("LargeDiT-600M/2", 256, 128, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("LargeDiT-3B/2 of 4 layers", 256, 128, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("DiT-L/2", 256, 256, ("bf16", "bf16-fast"), ("ops", "mlp")),
        ("DiT-B/2", 256, 256, ("bf16", "bf16-fast"), ("none", "ops")),
        ("DiT-S/2", 256, 256, ("bf16", "bf16-fast"), ("none", "ops")),
    ),
}
