"""fast-DiT's table: gradient checkpointing x mixed precision x features from the VAE beforehand; steps/s and memory.

Both train the same batch by the same precision policy: ditfast with recompute `block` or `none`, and the reference
model as fast-DiT's train.py does it (reentrant checkpoints, a loop over the parameters for the EMA, a loss that is read
every step). Without features every step encodes its images in fp32, as fast-DiT's does outside autocast, by diffusers'
AutoencoderKL; its weights are random, which takes as long.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.contest import Contest, Settings
from bench.oracles import Recipe
from bench.report.markdown import megabytes, number
from bench.report.markdown import table as markdown
from bench.rows import DITFAST, Job, Row
from bench.suites import Options
from bench.suites.model import Steps, distinct_bytes, state_of
from bench.timing import Timing
from bench.training import model_config, random_batch, trainer_for
from ditfast.config import PRECISIONS
from ditfast.distributed import World
from ditfast.hardware import rate_name
from ditfast.kernels.peers import PeerError
from ditfast.train import Trainer

PEER = "fast-DiT"
SCALING = 0.18215  # what the official code multiplies Stable Diffusion's latents by


@dataclass(frozen=True)
class Published:
    """What fast-DiT's README says of DiT-XL/2 at 256 px and batch 128 on an A100; no steps: out of memory."""

    steps_per_s: float | None
    megabytes: int | None


# By (checkpointing, mixed precision, features beforehand): github.com/chuanyangjin/fast-DiT, Improved Training
# Performance.
PUBLISHED: dict[tuple[bool, ...], Published] = {
    (False, False, False): Published(None, None),
    (True, False, False): Published(0.43, 44045),
    (True, True, False): Published(0.56, 40461),
    (True, True, True): Published(0.84, 27485),
}
# By scale: model, pixels, batch, mixed precision, the VAE's channels. The published VAE has SD's channels; a CPU's DiT
# is so much smaller that a VAE with a quarter of them keeps the proportion of both.
SIZES: dict[str, tuple[str, int, int, str, tuple[int, ...]]] = {
    "small": ("tiny", 64, 2, "bf16", (32, 32, 32, 32)),
    "cpu": ("DiT-S/2 of 2 layers", 128, 4, "bf16", (32, 32, 32, 64)),
    "gpu": ("DiT-XL/2", 256, 128, "fp16", (128, 256, 512, 512)),
}


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    model: str
    pixels: int
    batch: int
    precision: str
    channels: tuple[int, ...]
    checkpointing: bool
    cached: bool
    device: torch.device

    @property
    def mixed(self) -> bool:
        return self.precision != "fp32"

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        switches = {"checkpointing": self.checkpointing, "mixed": self.mixed, "cached": self.cached}
        name = ", ".join(f"{key} {'on' if on else 'off'}" for key, on in switches.items())
        dtype = rate_name(PRECISIONS[self.precision])
        return "fast-dit", name, dtype, f"{self.model}, {self.pixels} px, batch {self.batch}"

    def measure(self, settings: Settings) -> list[Row]:
        """The rows of ditfast and of fast-DiT's way."""
        world, model = World(0, 1, self.device), model_config(self.model, self.pixels)
        recompute = "block" if self.checkpointing else "none"
        with trainer_for(model, self.batch, self.precision, world, recompute=recompute) as trainer:
            return self.contest(trainer).measure(settings)

    def contest(self, trainer: Trainer) -> Contest:
        """The contest of both."""
        batch = random_batch(trainer.config.model, self.batch, self.device)
        steps = Steps(trainer, batch)
        recipe = Recipe(sdpa=True, checkpointed=self.checkpointing, plain_loop=True)
        peer = cache(lambda: steps._baseline(recipe, trainer.config.precision))
        encode = cache(lambda: Encoder(self.pixels, self.batch, self.channels, self.device))

        def run(step: Callable[[], Callable[..., Any]]) -> None:
            x = batch[0] if self.cached else encode()()
            step()(x, *batch[1:])
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        def check(provider: str) -> str | None:
            return steps.judge(trainer if provider == DITFAST else peer())

        def details(provider: str, timing: Timing) -> dict[str, Any]:
            encoder = [] if self.cached else encode().weights
            held = distinct_bytes([*state_of(trainer if provider == DITFAST else peer()), *encoder])
            return {"steps_per_s": 1e3 / timing.ms, "state_bytes": held}

        runs = {DITFAST: partial(run, lambda: trainer.learn), PEER: partial(run, peer)}
        extra = {"precision": self.precision, "vae_channels": None if self.cached else list(self.channels)}
        return Contest(*self.job, runs, check, extra=extra, details=details, wall=True)


class Encoder:
    """Images -> latents by an AutoencoderKL with random weights; PeerError without diffusers."""

    def __init__(self, pixels: int, batch: int, channels: Sequence[int], device: torch.device):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise PeerError(f"no diffusers here ({error}); pip install 'ditfast[vae]'") from error
        stages = len(channels)
        with torch.device(device):
            vae: Any = AutoencoderKL(
                block_out_channels=tuple(channels), down_block_types=("DownEncoderBlock2D",) * stages,
                up_block_types=("UpDecoderBlock2D",) * stages, layers_per_block=2, latent_channels=4,
            )  # fmt: skip
        self.vae = vae.eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.rand(batch, 3, pixels, pixels, generator=generator, device=device) * 2 - 1

    @property
    def weights(self) -> list[Tensor]:
        return list(self.vae.parameters())

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The latents (B, 4, pixels / 8, pixels / 8) of the images."""
        return self.vae.encode(self.images).latent_dist.sample() * SCALING


def contests(options: Options) -> Iterator[Line]:
    """The table's lines, in fast-DiT's order, and those that it leaves out after them."""
    model, pixels, batch, mixed, channels = SIZES[options.scale.name]
    switches = sorted(product((False, True), repeat=3), key=lambda s: s not in PUBLISHED)
    for checkpointing, mixes, cached in switches:
        precision = mixed if mixes else "fp32"
        yield Line(model, pixels, batch, precision, channels, checkpointing, cached, options.device)


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown: published figures beside the measured ones."""
    lines: dict[tuple[bool, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(part.endswith(" on") for part in row.name.split(", ")), {})[row.provider] = row
    head = ("checkpointing", "mixed precision", "cached features", "published steps/s", "published MB",
            "fast-DiT's way steps/s", "MB", "ditfast steps/s", "MB", "ratio")  # fmt: skip
    body = []
    for switches, found in lines.items():
        known = PUBLISHED.get(switches)
        own, peer = found.get(DITFAST), found.get(PEER)
        ratio = peer.ms / own.ms if own and peer and own.ms and peer.ms else None
        body.append((
            *("yes" if on else "no" for on in switches), *_published(known), *_cells(peer), *_cells(own),
            "-" if ratio is None else f"{ratio:.2f}",
        ))  # fmt: skip
    return markdown(head, body, left=3)


def _published(known: Published | None) -> tuple[str, str]:
    if known is None:
        return "-", "-"
    return ("out of memory", "") if known.steps_per_s is None else (str(known.steps_per_s), f"{known.megabytes:,}")


def _cells(row: Row | None) -> tuple[str, str]:
    """Steps per second and MB: what lives as long as the run, and the most that a step adds."""
    if row is None or row.ms is None:
        why = (row and row.why_not) or "-"
        return ("out of memory" if "OutOfMemory" in why else why.partition(":")[0]), "-"
    return number(row.extra["steps_per_s"]), megabytes(row.extra["state_bytes"] + (row.peak_bytes or 0))
