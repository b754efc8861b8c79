"""MindONE's tables of DiT: a training step at batch 64 with recompute off and on and on several devices, its compile
time, and DDPM-250 sampling; beside them the time to load a checkpoint.

The published figures are of Ascend 910* with MindSpore 2.3.1 in graph mode, DiT-XL/2 at 256 px, in fp16.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contest import Contest, Settings
from bench.machine import ROOT
from bench.report.markdown import NOT_MEASURED, number
from bench.report.markdown import table as markdown
from bench.rows import DITFAST, Job, Row
from bench.suites import Options
from bench.suites.model import TrainingJob
from bench.suites.sample import Samplers, SamplingJob
from bench.suites.scale import ScalingJob
from bench.timing import Timing
from bench.training import fill_zeros, model_config, random_batch, trainer_for
from ditfast.build import build_model
from ditfast.config import PRECISIONS, RunConfig, save_config
from ditfast.convert import export_official
from ditfast.distributed import World
from ditfast.hardware import rate_name
from ditfast.sample import Network, load_network, open_weights

# By line: what github.com/mindspore-lab/mindone, examples/dit/README.md, says of it. Loading is not published.
PUBLISHED = {
    "step, recompute off, 1 device": "0.89 s, 71.91 images/s",
    "step, recompute on, 1 device": "0.95 s, 67.37 images/s",
    "step, recompute on, 4 devices": "1.03 s, 248.52 images/s",
    "step, recompute on, 8 devices": "0.93 s, 515.61 images/s",
    "compile of the training step": "3 to 5 minutes",
    "DDPM-250 sampling, 1 image": "58.45 s (compile 82.83 s)",
}
STEP, COMPILED = "step, recompute", "compile of the training step"
LOAD, SAMPLE = "checkpoint loading", "DDPM-250 sampling, 1 image"
PATIENCE = 1800.0  # seconds for a compilation


@dataclass(frozen=True)
class Sizes:
    """Of the steps model, pixels, batch a device, precision and numbers of devices; the model that samples."""

    model: str
    pixels: int
    batch: int
    precision: str
    devices: tuple[int, ...]
    sampled: str


SIZES = {
    "small": Sizes("tiny", 64, 2, "bf16", (), "tiny"),
    "cpu": Sizes("DiT-S/2 of 2 layers", 128, 4, "bf16", (2,), "DiT-S/4 of 2 layers"),
    "gpu": Sizes("DiT-XL/2", 256, 64, "fp16", (4, 8), "DiT-XL/2"),
}


@dataclass(frozen=True)
class Line:
    """A line of the table: what is measured by `measured`, under the line's job."""

    job: Job
    measured: Callable[[Job, Settings], list[Row]]

    def measure(self, settings: Settings) -> list[Row]:
        """Its rows."""
        suite, name, _, shape = self.job
        return [replace(row, suite=suite, name=name, shape=shape) for row in self.measured(self.job, settings)]


def contests(options: Options) -> Iterator[Line]:
    """The table's lines."""
    sizes, device = SIZES[options.scale.name], options.device
    dtype = rate_name(PRECISIONS[sizes.precision])
    shape = f"{sizes.model}, {sizes.pixels} px, batch {sizes.batch}"
    for mode, policy in (("off", "none"), ("on", "block")):
        step = TrainingJob(sizes.model, sizes.pixels, sizes.batch, sizes.precision, device, policy, compile=False)
        yield Line(("mindone", f"{STEP} {mode}, 1 device", dtype, shape), partial(_step, step))
    for count in sizes.devices:
        scaled = ScalingJob(sizes.model, sizes.pixels, sizes.batch, sizes.precision, device, count)
        name = f"{STEP} on, {count} devices"
        yield Line(("mindone", name, dtype, f"{shape} a device, recompute ops"), partial(_scaled, scaled))
    yield Line(("mindone", LOAD, dtype, sizes.model), partial(_loading, sizes, device))
    sampled = SamplingJob(sizes.sampled, sizes.pixels, 1, 1, "ddpm", 250, sizes.precision, device, compile=False)
    yield Line(("mindone", SAMPLE, dtype, f"{sizes.sampled}, {sizes.pixels} px"), partial(_sampling, sampled))
    # The longest comes last: with --seconds the others are there.
    yield Line(("mindone", COMPILED, dtype, shape), partial(_compilation, sizes, device, options.scale.compile))


def _step(step: TrainingJob, _: Job, settings: Settings) -> list[Row]:
    return [row for row in step.measure(settings) if row.provider == DITFAST or row.ms is not None]


def _scaled(scaled: ScalingJob, _: Job, settings: Settings) -> list[Row]:
    return scaled.measure(settings)


def _sampling(sampling: SamplingJob, job: Job, settings: Settings) -> list[Row]:
    """ditfast alone: the peers are in the sample suite."""
    samplers = Samplers(sampling)
    contest = Contest(
        *job, {DITFAST: partial(samplers.run, DITFAST)}, samplers.check, wall=True,
        details=lambda _, timing: {"ms_per_image": timing.ms},
    )  # fmt: skip
    return contest.measure(replace(settings, rounds=3))


def _loading(sizes: Sizes, device: torch.device, job: Job, settings: Settings) -> list[Row]:
    """From a training script's file on disk, in the page cache, to a network with its EMA on the device."""
    with tempfile.TemporaryDirectory(prefix="ditfast-bench-") as folder:
        path, config = Path(folder) / "DiT.pt", Path(folder) / "config.yaml"
        run = RunConfig(model=model_config(sizes.model, sizes.pixels))
        model = build_model(run.model)
        fill_zeros(model.parameters())
        weights = model.state_dict()
        ema = {name: 0.75 * weight for name, weight in weights.items()}
        export_official(path, weights, ema)
        save_config(run, config)

        def load() -> Network:
            network = load_network(open_weights(path, config), device, sizes.precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return network

        contest = Contest(
            *job, {DITFAST: load}, lambda _: unlike(load(), ema), extra={"file_bytes": path.stat().st_size}, wall=True
        )
        return contest.measure(replace(settings, rounds=5))


def unlike(network: Network, saved: Mapping[str, Tensor]) -> str | None:
    """None for a network of these weights, rounded to its policy's dtype and bit for bit, else which are others."""
    found = network.model.state_dict()
    if odd := sorted(found.keys() ^ saved.keys()):
        return f"{', '.join(odd[:3])} ({len(odd)} in all) are not in both the network and what was saved"
    wanted = {name: value.to(network.device, network.precision.params) for name, value in saved.items()}
    others = [name for name, value in wanted.items() if not _same_bits(found[name], value)]
    return f"{others[0]} ({len(others)} in all) is not what was saved, bit for bit" if others else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


def _compilation(sizes: Sizes, device: torch.device, compiles: bool, job: Job, _: Settings) -> list[Row]:
    """The first training step less a later one, in a process with empty caches: Triton's kernels, or torch.compile."""
    rows = []
    for provider in (DITFAST, f"{DITFAST} train.compile")[: 1 + compiles]:
        with tempfile.TemporaryDirectory(prefix="ditfast-bench-") as folder:
            caches = {f"{name}_CACHE_DIR": str(Path(folder) / name) for name in ("TRITON", "TORCHINDUCTOR")}
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            arguments = [sizes.model, str(sizes.pixels), str(sizes.batch), sizes.precision, str(device)]
            compiled = str(int(provider != DITFAST))
            done = subprocess.run(
                [sys.executable, "-m", "bench.tables.mindone", *arguments, compiled],
                env=os.environ | caches | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the first step of {provider} failed: {done.stderr[-2000:]}")
        first, later = json.loads(done.stdout.splitlines()[-1])
        extra = {"first_step_s": first, "later_step_s": later}
        rows.append(_row(job, provider, Timing((1e3 * max(0.0, first - later),)), extra))
    return rows


def _row(job: Job, provider: str, timing: Timing, extra: dict[str, Any]) -> Row:
    suite, name, dtype, shape = job
    return Row(suite, name, provider, dtype, shape, timing.ms, timing.p20, timing.p80, extra=extra)


def first_step(model: str, pixels: str, batch: str, precision: str, device: str, compiled: str) -> list[float]:
    """Seconds of a process's first training step and of its third."""
    config, on = model_config(model, int(pixels)), torch.device(device)
    with trainer_for(config, int(batch), precision, World(0, 1, on), compile=compiled == "1") as trainer:
        taken = []
        for _ in range(3):
            inputs = random_batch(config, int(batch), on)
            start = time.perf_counter()
            trainer.learn(*inputs)
            if on.type == "cuda":
                torch.cuda.synchronize(on)
            taken.append(time.perf_counter() - start)
    return [taken[0], taken[-1]]


def table(rows: Sequence[Row]) -> str:
    """The tables in Markdown: published figures beside the measured ones."""
    lines = []
    for row in rows:
        options = row.provider.removeprefix(DITFAST).strip() or "-"
        lines.append((row.name, row.shape, options, PUBLISHED.get(row.name, "-"), _figure(row)))
    here = {row.name for row in rows}
    lines += [(name, "-", "-", text, NOT_MEASURED) for name, text in PUBLISHED.items() if name not in here]
    return markdown(("", "here", "options", "published", "measured"), lines, left=3)


def _figure(row: Row) -> str:
    if row.ms is None:
        return row.why_not or NOT_MEASURED
    text = f"{number(row.ms / 1e3)} s"
    rate = row.extra.get("images_per_s")
    return text if rate is None else f"{text}, {number(rate)} images/s"


if __name__ == "__main__":
    print(json.dumps(first_step(*sys.argv[1:])))
