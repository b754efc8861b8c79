"""Activation bytes per token and layer: the storages alive behind a forward, beside what layers/memory.py estimates.

Four layers and two samples more keep so many bytes more: that leaves out the weights, the embedders and the final
layer. First the outputs have to be right, and the gradients that are made of what was kept. On a GPU the allocator's
figure stands beside it, which rounds every tensor up to 512 bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import FLOAT64
from bench.contest import Settings
from bench.exactness import Truth, each_of
from bench.oracles import Recipe, build_reference, ditfast_names
from bench.rows import DITFAST, EAGER, Job, Row
from bench.storages import Storages
from bench.suites import Options
from bench.training import fill_zeros, label, model_config, random_batch
from ditfast.build import build_model, predictor
from ditfast.config import PRECISIONS, ModelConfig, Precision
from ditfast.kernels import backend_of
from ditfast.layers import DiffusionTransformer, activation_bytes
from ditfast.plan import POLICIES

DEPTHS = (4, 8)  # whose difference has `block:4`'s share of blocks computed again
# Whose blocks keep, in the same units, what the policy of that name is for.
PEERS = {"none": (EAGER, Recipe(sdpa=True)), "block": ("fast-DiT", Recipe(sdpa=True, checkpointed=True))}


@dataclass(frozen=True)
class MemoryJob:
    """A size's blocks under a recompute policy."""

    model: str
    pixels: int
    batches: tuple[int, int]
    precision: str
    recompute: str
    device: torch.device

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        name, dtype = label(self.model, self.precision)
        return "memory", f"{name} recompute={self.recompute}", dtype, f"{self.pixels} px"

    def measure(self, settings: Settings) -> list[Row]:
        """ditfast's row, and that of the peer that keeps as much by intention."""
        config, precision = model_config(self.model, self.pixels), PRECISIONS[self.precision]
        fused = backend_of("adaln_modulate", self.device, precision.stream) == "triton"

        def estimate(depth: int) -> float:
            with torch.device("meta"):
                model = build_model(replace(config, depth=depth))
            return activation_bytes(model, self.recompute, 1, precision.stream, precision.compute, fused)

        rows = [self._row(DITFAST, self._ours, self._per_token([estimate(depth) for depth in DEPTHS]))]
        if self.recompute in PEERS:
            provider, recipe = PEERS[self.recompute]
            rows.append(self._row(provider, partial(self._reference, recipe=recipe)))
        return rows

    def _row(self, provider: str, build: Callable[[ModelConfig], nn.Module], estimate: float | None = None) -> Row:
        """What a provider's blocks keep, beside an estimate of it, where they are right."""
        figures: dict[str, Any]
        if wrong := self._wrong(build):
            figures = {"refused": wrong}
        else:
            measured, allocated = self._measured(build)
            figures = {"bytes_per_token_layer": measured, "allocated_per_token_layer": allocated}
            if estimate is not None:
                figures |= {"estimate_per_token_layer": estimate, "error_percent": 100 * (estimate / measured - 1)}
        extra = {"policy": self.recompute, "precision": self.precision, **figures}
        return Row(*self.job[:2], provider, *self.job[2:], extra=extra)

    def _per_token(self, bytes_of_depths: Sequence[float]) -> float:
        """Bytes per token and layer, of one sample's in models of DEPTHS layers."""
        config = model_config(self.model, self.pixels)
        assert config.input_size is not None
        tokens = config.input_size[0] * config.input_size[1] // config.patch_size**2
        fewer, more = bytes_of_depths
        return (more - fewer) / (DEPTHS[1] - DEPTHS[0]) / tokens

    def _measured(self, build: Callable[[ModelConfig], nn.Module]) -> tuple[float, float | None]:
        """Bytes per token and layer: of the storages alive, and by the allocator of a GPU."""
        few, many = self.batches
        of_depths = []
        for depth in DEPTHS:
            model = build(replace(model_config(self.model, self.pixels), depth=depth))
            (alive, held), (alive_more, held_more) = self._kept(model, few), self._kept(model, many)
            of_depths.append(((alive_more - alive) / (many - few), (held_more - held) / (many - few)))
        alive_bytes, held_bytes = zip(*of_depths, strict=True)
        on_gpu = self.device.type == "cuda"
        return self._per_token(alive_bytes), self._per_token(held_bytes) if on_gpu else None

    def _ours(self, config: ModelConfig) -> nn.Module:
        with self.device, torch.random.fork_rng():
            torch.manual_seed(0)  # the same weights for all
            model = build_model(config)
        fill_zeros(model.parameters())
        model = PRECISIONS[self.precision].apply(model)
        model.recompute = self.recompute
        return model

    def _reference(self, config: ModelConfig, recipe: Recipe) -> nn.Module:
        weights = {name: p.detach() for name, p in self._ours(config).named_parameters() if p.requires_grad}
        return build_reference(config, weights, recipe).to(PRECISIONS[self.precision].params)

    def _wrong(self, build: Callable[[ModelConfig], nn.Module]) -> str | None:
        """None where a model's outputs and gradients are within the budgets of exactness.py, else what is wrong."""
        config, own = replace(model_config(self.model, self.pixels), depth=DEPTHS[0]), PRECISIONS[self.precision]
        x, y, t, *_ = random_batch(config, 1, self.device)

        def results(model: nn.Module, precision: Precision) -> dict[str, Tensor]:
            with precision.autocast(self.device):
                out = model.eval()(x.to(precision.params), t, y)
            out.to(torch.promote_types(out.dtype, torch.float32)).square().mean().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            ours = isinstance(model, DiffusionTransformer)
            return {"outputs": out.detach()} | (grads if ours else ditfast_names(config, grads))

        oracles = ((self._reference(config, Recipe()).to(precision.params), precision) for precision in (FLOAT64, own))
        exact, eager = (results(*oracle) for oracle in oracles)
        return Truth(exact, eager, each_of(own)).judge(results(build(config), own))

    def _kept(self, model: nn.Module, batch: int) -> tuple[int, int]:
        """Bytes behind a forward: storages alive, and what the allocator holds more than before (0 on a CPU)."""
        precision = PRECISIONS[self.precision]
        predict = predictor(model, precision, self.device)
        x, y, t, *_ = random_batch(model_config(self.model, self.pixels), batch, self.device)
        before = self._allocated()
        with Storages() as storages:
            out: Tensor = predict(x.to(precision.params), t, y)
        alive, held = storages.alive(), self._allocated() - before
        assert out.requires_grad
        return alive, held

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def contests(options: Options) -> Iterator[MemoryJob]:
    """Every recompute policy of a model of every family, in the precisions of the scale."""
    for model, pixels, batches, precisions in JOBS[options.scale.name]:
        for precision in precisions:
            for policy in POLICIES:
                yield MemoryJob(model, pixels, batches, precision, policy, options.device)


def table(rows: Sequence[Row]) -> str:
    """A line per job."""
    lines = [
        f"{'job':44}{'dtype':8}{'provider':12}{'measured':>10}{'estimate':>10}{'error':>8}  bytes per token and layer"
    ]
    for row in rows:
        figures = [row.extra.get(f"{key}_per_token_layer") for key in ("bytes", "estimate")]
        cells = "".join(f"{'-' if value is None else f'{value:.0f}':>10}" for value in figures)
        error = row.extra.get("error_percent")
        cells += f"{'-' if error is None else f'{error:+.1f} %':>8}"
        lines.append(f"{row.name:44}{row.dtype:8}{row.provider:12}{cells}  {row.why_not or ''}".rstrip())
    return "\n".join(lines)


# By scale: size, pixels, batches of few and of many, precisions.
JOBS: dict[str, tuple[tuple[str, int, tuple[int, int], tuple[str, ...]], ...]] = {
    "small": (
        ("tiny", 64, (1, 3), ("bf16",)),
        ("tiny SiT-S/2", 64, (1, 3), ("bf16",)),
        ("tiny LightningDiT-XL/1", 64, (1, 3), ("bf16",)),
        ("LargeDiT-tiny/2", 64, (1, 3), ("bf16",)),
    ),
    "cpu": (
        ("DiT-S/2", 256, (1, 3), ("bf16", "bf16-fast", "fp32")),
        ("SiT-S/2", 256, (1, 3), ("bf16",)),
        ("tiny LightningDiT-XL/1", 256, (1, 3), ("bf16",)),
        ("LargeDiT-tiny/2", 256, (1, 3), ("bf16",)),
    ),
    "gpu": (
        ("DiT-XL/2", 256, (8, 32), ("bf16", "bf16-fast")),
        ("SiT-XL/2", 256, (8, 32), ("bf16", "bf16-fast")),
        ("LightningDiT-XL/1", 256, (8, 32), ("bf16", "bf16-fast")),
        ("LargeDiT-600M/2", 256, (8, 32), ("bf16", "bf16-fast")),
        ("LargeDiT-3B/2", 256, (8, 32), ("bf16", "bf16-fast")),
    ),
}
