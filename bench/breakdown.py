"""Where a training step's time goes: the profiler's events of ditfast's and of the eager reference's by kernel class.

On a GPU the time is that of the kernels, each counted for the op that launched it; on a CPU that of the ops themselves.
What lies between them, and what no rule knows, is "other". A loss in plain PyTorch is counted by its single ops.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.contest import Settings, admit
from bench.rows import DITFAST, EAGER, Job, Row
from bench.suites import Options
from bench.suites.model import JOBS, Steps
from bench.timing import Timing
from bench.training import model_config, random_batch, trainer_for
from ditfast.config import PRECISIONS
from ditfast.distributed import World
from ditfast.hardware import Ceilings, rate_name
from ditfast.plan import step as plan
from ditfast.train import Trainer

# What these ops and scopes call belongs to them, whatever it is by itself.
SCOPES = {
    "data": r"^data$",
    "attention": r"scaled_dot_product|attention|flash",
    "optimizer": r"adamw|Optimizer\.step|_foreach|GradScaler",
    "loss": r"diffusion_loss|q_sample|::loss$",
    "norm, modulate, gate": r"layer_norm|LayerNorm|rms_norm|modulate|gate_residual|qk_norm",
}
# The others by themselves, the innermost that has a name here counts. The reference's gates and modulation are single
# products and sums.
OPS = {
    "GEMM": r"::(addmm|mm|linear|matmul|convolution\w*|conv2d|mkldnn_\w+)_?$|gemm|GEMM|cutlass|nvjet",
    "attention": r"::(bmm|baddbmm|_?softmax\w*)$",
    "GELU": r"gelu|GELU|Gelu",
    "casts and copies": r"::(_to_copy|to|copy_|contiguous|clone)$|Memcpy",
    "norm, modulate, gate": r"::(mul|add|sum|addcmul|sub)_?$|(Mul|Add|Sum)Backward",
}
CLASSES = (
    "GEMM",
    "attention",
    "norm, modulate, gate",
    "GELU",
    "casts and copies",
    "optimizer",
    "loss",
    "data",
    "other",
)


def kernel_class(names: list[str]) -> str:
    """One of CLASSES, of an op or kernel by its name and those of all that called it, the innermost first."""
    for name in reversed(names):
        if found := _first(SCOPES, name):
            return found
    return next((found for name in names if (found := _first(OPS, name))), "other")


def _first(rules: Mapping[str, str], name: str) -> str | None:
    return next((kind for kind, pattern in rules.items() if re.search(pattern, name)), None)


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of a run by kernel class, together its time by the clock."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - start)
    spent = defaultdict[str, float](float)
    for event in profiler.events():
        if on_gpu:
            for kernel in event.kernels:
                spent[kernel_class([kernel.name, *_callers(event)])] += kernel.duration / 1e3
        elif event.device_type == torch.autograd.DeviceType.CPU:
            spent[kernel_class(_callers(event))] += event.self_cpu_time_total / 1e3
    spent["other"] += max(0.0, wall - sum(spent.values()))
    return dict(spent)


def _callers(event: Any) -> list[str]:
    """The names of an event and of all around it, the innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


@dataclass(frozen=True)
class Breakdown:
    """A training step of one size, by kernel class, of ditfast and of the eager reference."""

    model: str
    pixels: int
    batch: int
    precision: str
    device: torch.device

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        dtype = rate_name(PRECISIONS[self.precision])
        return "breakdown", self.model, dtype, f"{self.pixels} px, batch {self.batch}"

    def measure(self, settings: Settings) -> list[Row]:
        """A row for each provider, with the milliseconds by class; ditfast's also with what the limits allow."""
        world = World(0, 1, self.device)
        model = model_config(self.model, self.pixels)
        suite, name, dtype, shape = self.job
        with trainer_for(model, self.batch, self.precision, world, images=self.batch) as trainer:
            steps = Steps(trainer, random_batch(model, self.batch, self.device))
            reasons = {provider: why for provider in (DITFAST, EAGER) if (why := admit(steps.check, provider))}
            steps.forget()
            taken = self._profile(trainer, steps, settings, [p for p in (DITFAST, EAGER) if p not in reasons])
            least = least_ms(trainer, settings.limits)
        rows = [Row(suite, name, provider, dtype, shape, extra=why) for provider, why in reasons.items()]
        for provider, samples in taken.items():
            whole = Timing(tuple(sum(spent.values()) for spent in samples))
            classes = {kind: Timing(tuple(spent.get(kind, 0.0) for spent in samples)).ms for kind in CLASSES}
            extra = {"batch": self.batch, "classes": classes, "samples": len(samples)}
            extra |= {"least_ms": least} if provider == DITFAST else {}
            rows.append(Row(suite, name, provider, dtype, shape, whole.ms, whole.p20, whole.p80, extra=extra))
        return rows

    def _profile(
        self, trainer: Trainer, steps: Steps, settings: Settings, providers: Sequence[str]
    ) -> dict[str, list[dict[str, float]]]:
        """Samples of each provider, taken in turns after a step that warms up."""

        def run(provider: str) -> None:
            with record_function("data"):
                x, y = next(trainer.loader)
                x, y = x.to(self.device), y.to(self.device)
                t, weights, noise, drop = trainer._draw(x.shape[1:])
            steps.step(provider)(x, y, t, weights, noise, drop)

        taken: dict[str, list[dict[str, float]]] = {provider: [] for provider in providers}
        for provider in taken:
            run(provider)
        deadline = time.monotonic() + 2 * settings.seconds
        for turn in range(settings.rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            for provider, samples in taken.items():
                samples.append(profiled(partial(run, provider), self.device))
        return taken


def least_ms(trainer: Trainer, limits: Ceilings | None) -> dict[str, float]:
    """Milliseconds that a step's FLOPs and bytes need at the measured limits, by the classes that the plan counts."""
    config = trainer.config
    precision, images = config.precision, config.train.batch_size
    if limits is None or rate_name(precision) not in limits.gemm_tflops:
        return {}
    flops, bandwidth = 1e9 * limits.gemm_tflops[rate_name(precision)], 1e6 * limits.copy_gbps
    policies = [block.recompute for block in trainer.model.blocks]
    stream = plan.stream_bytes(trainer.model, precision, policies, images)
    weights, casts = plan.optimizer_bytes(trainer.model, precision, len(config.optim.ema_rates))
    return {
        "GEMM": images * sum(plan.gemm_flops(trainer.model, policies).values()) / flops,
        "attention": images * plan.attention_flops(trainer.model, policies) / flops,
        "norm, modulate, gate": stream["elementwise"] / bandwidth,
        "GELU": stream["gelu"] / bandwidth,
        "casts and copies": casts / bandwidth,
        "optimizer": weights / bandwidth,
    }


def contests(options: Options) -> Iterator[Breakdown]:
    """The first two precisions of every size that the model suite measures."""
    for model, pixels, batch, precisions, _ in JOBS[options.scale.name]:
        for precision in precisions[:2]:
            yield Breakdown(model, pixels, batch, precision, options.device)


def table(rows: Sequence[Row]) -> str:
    """Milliseconds by class, a column for each job and provider; then who was not measured, and why."""
    refused = [f"{row.name} {row.dtype} {row.provider} {row.why_not}" for row in rows if row.ms is None]
    rows = [row for row in rows if row.ms is not None]
    lines = [f"{'ms':22}" + "".join(f"  {row.name + ' ' + row.dtype + ' ' + row.provider:>26}" for row in rows)]
    for kind in CLASSES:
        shares = (row.extra["classes"][kind] / (row.ms or 1) for row in rows)
        cells = (f"{row.extra['classes'][kind]:.1f} ({share:.0%})" for row, share in zip(rows, shares, strict=True))
        lines.append(f"{kind:22}" + "".join(f"  {cell:>26}" for cell in cells))
    return "\n".join(lines + refused)
