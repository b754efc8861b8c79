"""Training with a real input pipeline: latents read from disk in fast-DiT's layout, and how long a step waits for them.

Each provider is a loader under the same Trainer, whose whole `step` is timed: ditfast's with workers and without,
fast-DiT's dataset under torch's DataLoader, and a batch that stays on the device, which waits for nothing. The files
have just been written, so the system's page cache has them: this is the cost of reading and collating, not of a disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.contest import Contest, Settings
from bench.rows import DITFAST, Job, Row
from bench.suites import Options
from bench.suites.model import Steps
from bench.timing import Prepared, Timing
from bench.training import SizedJob, label, model_config, random_batch, trainer_for
from ditfast.data import FeatureFolder, Loader
from ditfast.distributed import World
from ditfast.train import Trainer

NO_WORKERS, RESIDENT, FAST_DIT = f"{DITFAST} without workers", "resident batch", "fast-DiT"
PREFETCH = 2  # batches that torch's DataLoader reads ahead for each worker
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FeedJob(SizedJob):
    """So many steps in a row of a size, from `images` files, `workers` processes reading."""

    steps: int
    images: int
    workers: int

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        shape = f"{self.pixels} px, batch {self.batch}, {self.steps} steps"
        name, dtype = label(self.model, self.precision)
        return "feed", name, dtype, shape

    def measure(self, settings: Settings) -> list[Row]:
        """The rows."""
        config, world = model_config(self.model, self.pixels), World(0, 1, self.device)
        with trainer_for(config, self.batch, self.precision, world, images=self.images) as trainer:
            feeds = Feeds(self, trainer)
            try:
                return self.contest(feeds).measure(settings)
            finally:
                feeds.close()

    def contest(self, feeds: "Feeds") -> Contest:
        """The contest of the loaders."""

        def details(provider: str, timing: Timing) -> dict[str, Any]:
            rate = 1e3 * self.batch * self.steps / timing.ms
            return {"images_per_s": rate, "data_wait": fmean(feeds.waits[provider][-len(timing.samples) :])}

        providers = (DITFAST, NO_WORKERS, FAST_DIT, RESIDENT)
        runs = {name: Prepared(partial(feeds.drain, name), feeds.run) for name in providers}
        extra = {"batch": self.batch, "steps": self.steps, "workers": self.workers, "precision": self.precision}
        return Contest(*self.job, runs, feeds.check, extra=extra, details=details, wall=True)


class Feeds:
    """A Trainer with one loader or the other, by provider."""

    def __init__(self, job: FeedJob, trainer: Trainer):
        self.job, self.trainer, self.own = job, trainer, trainer.loader
        assert isinstance(trainer.dataset, FeatureFolder)
        self.folder = trainer.dataset
        self.waits: dict[str, list[float]] = {name: [] for name in (DITFAST, NO_WORKERS, FAST_DIT, RESIDENT)}
        self.loader, self.made, self.judged = cache(self._loader), list[Any](), cache(self._judged)

    def drain(self, provider: str) -> str:
        """Empties what workers have read ahead while others were timed; the provider."""
        for _ in range(0 if provider in (RESIDENT, NO_WORKERS) else PREFETCH * self.job.workers):
            next(self.loader(provider))
        return provider

    def run(self, provider: str) -> None:
        """The steps, and the share of their time that was spent waiting for data."""
        trainer = self.trainer
        trainer.loader = self.loader(provider)  # type: ignore[assignment]
        trainer.meter.reset()
        for _ in range(self.job.steps):
            trainer.step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        self.waits[provider].append(trainer.meter.read(self.job.batch, 0, None)["data_wait"])

    def check(self, provider: str) -> str | None:
        """None where the step that all feed is right, and a batch is of files with their labels; else what is not."""
        if wrong := self.judged():
            return wrong
        known = {x.numpy().tobytes(): label for x, label in map(self.folder.__getitem__, range(len(self.folder)))}
        x, y = next(self.loader(provider))
        if len(x) != self.job.batch:
            return f"a batch has {len(x)} images, not {self.job.batch}"
        found = [known.get(image.numpy().tobytes()) for image in x.cpu()]
        return None if found == y.tolist() else f"labels are {y.tolist()}, the files have {found}"

    def _judged(self) -> str | None:
        steps = Steps(self.trainer, random_batch(self.trainer.config.model, self.job.batch, self.job.device))
        try:
            return steps.check(DITFAST)
        finally:
            steps.forget()

    def close(self) -> None:
        """Ends the workers: ditfast's ignore signals, so that an end of the process would wait for them."""
        self.trainer.loader = self.own
        for made in self.made:
            made.close()

    def _loader(self, provider: str) -> Iterator[Batch]:
        device, workers = self.trainer.device, self.job.workers if provider != NO_WORKERS else 0
        made: Any
        if provider == RESIDENT:
            x, y = next(self.own)
            made = _forever((x.to(device), y.to(device)))
        elif provider == FAST_DIT:
            folders = self.folder.features, self.folder.label_files
            made = plain_loader(*folders, self.job.batch, workers, device.type == "cuda")
        else:
            made = Loader(self.folder, self.job.batch, workers=workers, pin_memory=device.type == "cuda")
        self.made.append(made)
        return made


class _Files(Dataset):
    """Pairs of arrays as their files have them, (1, C, H, W) and (1,)."""

    def __init__(self, *folders: Path):
        self.folders, self.names = folders, sorted(path.name for path in folders[0].iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Batch:
        feature, label = (torch.from_numpy(np.load(folder / self.names[index])) for folder in self.folders)
        return feature, label


def plain_loader(features: Path, labels: Path, batch: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches without end, as fast-DiT's training script reads them."""
    loader = DataLoader(
        _Files(features, labels), batch, shuffle=True, num_workers=workers, pin_memory=pin, drop_last=True
    )
    while True:
        for x, y in loader:
            yield x.squeeze(dim=1), y.squeeze(dim=1)


def _forever(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def contests(options: Options) -> Iterator[FeedJob]:
    """One job at each size of the scale."""
    for model, pixels, batch, steps, images, workers, precision in JOBS[options.scale.name]:
        yield FeedJob(model, pixels, batch, precision, options.device, steps, images, workers)


# By scale: size, pixels, batch, steps, images on disk, workers, precision.
JOBS: dict[str, tuple[tuple[str, int, int, int, int, int, str], ...]] = {
    "small": (("tiny", 64, 4, 3, 24, 1, "fp32"),),
    "cpu": (("DiT-S/2 of 2 layers", 256, 4, 4, 128, 1, "fp32"),),
    "gpu": (
        ("DiT-XL/2", 256, 256, 16, 4096, 8, "bf16"),
        ("DiT-S/2", 256, 256, 32, 4096, 8, "bf16"),
    ),
}
