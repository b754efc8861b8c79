"""Milliseconds per image of every family's sampling with guidance: ditfast as `ditfast sample` draws, and its peers.

DiT and LargeDiT by DDPM-250 and DDIM-50, SiT and LightningDiT along their path, by the ODE and, of SiT, the SDE.
ditfast computes the modulation ahead and, on a GPU, replays CUDA graphs, whose recording is in its time as it is in the
command's. The peers are the reference model, eager and under torch.compile, in the loop of the official scripts: a
doubled batch, moments op by op. Every step is guided: LightningDiT's interval, which spares some, is left away.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import FLOAT64, attention_for
from bench.contest import Contest, Settings
from bench.exactness import Truth
from bench.oracles import Recipe, build_reference
from bench.rows import COMPILE, DITFAST, EAGER, Job, Row
from bench.suites import Options
from bench.timing import Timing
from bench.training import fill_zeros, label, run_config
from ditfast.build import build_diffusion, build_model
from ditfast.config import PRECISIONS, Precision, TrainConfig
from ditfast.cuda_graph import WARMUP
from ditfast.diffusion import SpacedDiffusion
from ditfast.diffusion.transport.paths import shift_timesteps
from ditfast.layers import forward_macs
from ditfast.sample import Network, SampleNoise, cycle_labels, draw

NO_GRAPH = f"{DITFAST} without graph"
PEERS = {EAGER: Recipe(sdpa=True), COMPILE: Recipe(sdpa=True, compiled=True)}
GUIDANCE = 4.0
# Of the samplers' loops, for parity: float64 over 250 would take longer than the timing. After the calls before a
# graph's recording and the one recorded come replays with other inputs, whatever form the last step has.
CHECKED_STEPS = WARMUP + 5


@dataclass(frozen=True)
class SamplingJob:
    """`batches` batches from a size by a sampler in so many steps."""

    model: str
    pixels: int
    batch: int
    batches: int
    sampler: str
    steps: int
    precision: str
    device: torch.device
    compile: bool = True

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        name, dtype = label(self.model, self.precision)
        return "sample", f"{name} {self.sampler}-{self.steps}", dtype, f"{self.pixels} px, batch {self.batch}"

    def measure(self, settings: Settings) -> list[Row]:
        """The rows."""
        return self.contest(Samplers(self)).measure(settings)

    def contest(self, samplers: "Samplers") -> Contest:
        """The contest of those who sample."""
        images = self.batch * self.batches
        own = [DITFAST, NO_GRAPH] if self.device.type == "cuda" else [DITFAST]
        providers = [*own, *(name for name in PEERS if self.compile or name != COMPILE)]
        # With guidance every image is two.
        flops = 2 * 2 * forward_macs(samplers.network.model) * images * self.steps

        def details(provider: str, timing: Timing) -> dict[str, Any]:
            return {"ms_per_image": timing.ms / images, "cuda_graph": provider == DITFAST and len(own) > 1}

        return Contest(
            *self.job, {name: partial(samplers.run, name) for name in providers}, samplers.check,
            flops=flops, details=details, wall=True,
            extra={
                "sampler": self.sampler, "steps": self.steps, "batch": self.batch, "images": images,
                "guidance_scale": GUIDANCE, "precision": self.precision,
            },
        )  # fmt: skip


class Samplers:
    """Who samples, by provider, all from the same weights."""

    def __init__(self, job: SamplingJob):
        gc.collect()  # As these do, those before refer to themselves, and would keep their models beside these.
        self.job, self.device, self.precision = job, job.device, PRECISIONS[job.precision]
        config = run_config(job.model, job.pixels)
        options = replace(
            config.sample, sampler=job.sampler, steps=job.steps, guidance_scale=GUIDANCE, guidance_interval=None,
            batch_size=job.batch,
        )  # fmt: skip
        self.config = replace(config, train=TrainConfig(precision=job.precision), sample=options)
        with self.device:
            model = build_model(self.config.model)
        fill_zeros(model.parameters())
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.network = Network(self.precision.apply(model).eval().requires_grad_(False), self.precision, self.device)
        self.labels = cycle_labels(job.batch * job.batches, None, model.y_embedder.num_classes)
        self.peer, self.truth = cache(self._peer), cache(self._truth)

    def run(self, provider: str, steps: int | None = None) -> Tensor:
        """The samples (N, C, H, W) on the CPU, from the noise that `ditfast sample --seed 0` starts with."""
        if provider in PEERS:
            return self.official(*self.peer(provider), steps or self.job.steps)
        options = replace(
            self.config.sample,
            steps=steps or self.job.steps,
            cuda_graph=provider == DITFAST and self.device.type == "cuda",
        )
        return draw(self.network, replace(self.config, sample=options), self.labels)

    def check(self, provider: str) -> str | None:
        """None where samples of a few steps are within the budgets of exactness.py, else what is wrong."""
        return self.truth().judge({"samples": self.run(provider, CHECKED_STEPS)})

    def official(
        self,
        model: Callable[..., Tensor],
        attention: Callable[..., Any],
        steps: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The samples by the official scripts' loop in `dtype`, with ditfast's noise."""
        null, loop = self.network.num_classes, self._loop(steps)
        config = self.config.model
        assert config.in_channels is not None and config.input_size is not None
        shape, drawn = (config.in_channels, *config.input_size), []
        for start in range(0, len(self.labels), self.job.batch):
            y = self.labels[start : start + self.job.batch].to(self.device)
            draw_noise = SampleNoise(0, range(start, start + len(y)), shape, self.device)
            both = torch.cat([y, torch.full_like(y, null)])
            with torch.no_grad(), attention():
                x = doubled(draw_noise().to(dtype))
                for step, noisy in loop:
                    x = step(model, x, both, doubled(draw_noise().to(dtype)) if noisy else None)
            drawn.append(x.chunk(2)[0].cpu())
        return torch.cat(drawn)

    def _loop(self, steps: int) -> list[tuple[Callable[..., Tensor], bool]]:
        """The steps of the job's sampler, each `step(model, x, y, noise or None)`, and whether it takes noise."""
        config, sampler = self.config, self.job.sampler
        if config.process == "ddpm":
            ddim = sampler == "ddim"
            spacing = f"ddim{steps}" if ddim else str(steps)
            process = build_diffusion(config.diffusion, config.model.learn_sigma, spacing)
            return [(partial(official_step, process, i), not ddim) for i in reversed(range(process.num_timesteps))]
        # An SDE's last step is longer, and without noise.
        noisy = steps - 1 if sampler == "sde" else 0
        points = torch.linspace(0, 1, steps + (sampler == "ode"), dtype=torch.float64)
        times = shift_timesteps(points, config.sample.timestep_shift)
        if sampler == "sde":
            times = torch.cat([times * (1 - config.sample.last_step_size), times.new_ones(1)])
        spans = enumerate(times.unfold(0, 2, 1).tolist())
        return [(partial(path_step, t, end - t, sampler == "sde"), k < noisy) for k, (t, end) in spans]

    def _peer(self, provider: str) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
        return self._reference(PEERS[provider], self.precision)

    def _reference(self, recipe: Recipe, precision: Precision) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
        """The guided reference model, and the context in which it attends."""
        config = self.config.model
        model = build_reference(config, self.weights, recipe).to(precision.params).eval().requires_grad_(False)
        if recipe.compiled:
            model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with precision.autocast(self.device):
                return model.forward_with_cfg(x.to(precision.params), t, y, GUIDANCE).to(x.dtype)

        attention = attention_for(recipe, config, 2 * self.job.batch, precision, self.device, train=False)
        return predict, attention

    def _truth(self) -> Truth:
        exact, eager = (
            self.official(*self._reference(Recipe(), precision), CHECKED_STEPS, dtype)
            for precision, dtype in ((FLOAT64, torch.float64), (self.precision, torch.float32))
        )
        return Truth({"samples": exact}, {"samples": eager})


def official_step(
    process: SpacedDiffusion, i: int, model: Callable[..., Tensor], x: Tensor, y: Tensor, noise: Tensor | None
) -> Tensor:
    """x at step i -> at step i - 1: ancestral with the noise given, DDIM of eta 0 without."""
    t = torch.full((len(x),), i, device=x.device)
    out = process.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs={"y": y})
    if noise is not None:
        return out["mean"] + (i > 0) * torch.exp(0.5 * out["log_variance"]) * noise
    eps = process.predict_eps_from_xstart(x, t, out["pred_xstart"])
    bar = process.gather("alphas_cumprod_prev", t, x)
    return out["pred_xstart"] * bar.sqrt() + (1 - bar).sqrt() * eps


def path_step(
    t: float, dt: float, sde: bool, model: Callable[..., Tensor], x: Tensor, y: Tensor, noise: Tensor | None
) -> Tensor:
    """x at t -> at t + dt on the path Linear from a velocity: Euler's step, of the SDE Euler-Maruyama's.

    The SDE is SiT's (arXiv:2401.08740) of the form "sigma": w = 1 - t times the score (t v - x) / (1 - t) drives it
    beside v, the noise has the variance 2 w dt.
    """
    velocity = model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), y)
    x_next = x + dt * (velocity + (t * velocity - x if sde else 0))
    return x_next if noise is None else x_next + (2 * (1 - t) * dt) ** 0.5 * noise


def doubled(x: Tensor) -> Tensor:
    """The batch twice: with the labels, and with the null class."""
    return torch.cat([x, x])


def contests(options: Options) -> Iterator[SamplingJob]:
    """Every sampling of the scale."""
    for model, pixels, batch, batches, sampler, steps, precision in JOBS[options.scale.name]:
        yield SamplingJob(
            model, pixels, batch, batches, sampler, steps, precision, options.device, options.scale.compile
        )


# By scale: size, pixels, batch, batches, sampler, steps, precision. Few batches cost time, many hide the recording.
JOBS: dict[str, tuple[tuple[str, int, int, int, str, int, str], ...]] = {
    "small": (
        ("tiny", 64, 2, 2, "ddpm", 5, "fp32"),
        ("tiny", 64, 1, 1, "ddim", 5, "fp32"),
        ("tiny SiT-S/2", 64, 2, 2, "sde", 5, "fp32"),
        ("tiny SiT-S/2", 64, 1, 1, "ode", 5, "fp32"),
        ("tiny LightningDiT-XL/1", 64, 1, 1, "ode", 5, "fp32"),
        ("LargeDiT-tiny/2", 64, 1, 1, "ddim", 5, "fp32"),
    ),
    "cpu": (
        ("DiT-S/2 of 2 layers", 256, 1, 1, "ddim", 10, "fp32"),
        ("SiT-S/2 of 2 layers", 256, 1, 1, "ode", 10, "fp32"),
        ("LightningDiT-B/1 of 2 layers", 128, 1, 1, "ode", 10, "fp32"),
        ("LargeDiT-tiny/2", 256, 1, 1, "ddim", 10, "fp32"),
        ("DiT-S/2 of 2 layers", 256, 1, 1, "ddpm", 10, "fp32"),
        ("SiT-S/2 of 2 layers", 256, 1, 1, "sde", 10, "fp32"),
        ("DiT-S/2 of 2 layers", 256, 4, 1, "ddim", 5, "fp32"),
    ),
    "gpu": (
        *(
            ("DiT-XL/2", 256, batch, batches, sampler, steps, precision)
            for batch, batches, sampler, steps in (
                (1, 8, "ddim", 50), (32, 4, "ddim", 50), (1, 4, "ddpm", 250), (32, 1, "ddpm", 250),
            )
            for precision in ("bf16", "bf16-fast")
        ),
        ("SiT-XL/2", 256, 32, 2, "ode", 50, "bf16"),
        ("SiT-XL/2", 256, 32, 2, "sde", 50, "bf16"),
        ("LightningDiT-XL/1", 256, 32, 2, "ode", 50, "bf16"),
        ("LargeDiT-600M/2", 256, 32, 2, "ddim", 50, "bf16"),
    ),
}  # fmt: skip
