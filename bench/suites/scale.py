"""Data-parallel ranks on one machine: efficiency, and the share of a step that is communication.

Every number of ranks is one launch of `torch.distributed.run`, in whose processes these take turns: rank 0 training
alone while the others wait, all ranks together, all without the reduction of their gradients, and the reduction by
itself. The batch of a rank is the same in all (weak scaling), and so is its share of the cores.

efficiency            step time of one rank alone over that of all together
communication_share   of a step together, what it takes longer than without reduction: what the backward did not hide
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contest import Settings
from bench.machine import ROOT
from bench.rows import DITFAST, Job, Row
from bench.suites import Options
from bench.suites.model import Steps
from bench.timing import Timing
from bench.training import SizedJob, label, model_config, random_batch, trainer_for
from ditfast.distributed import World
from ditfast.train import Trainer

BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time
PATIENCE = 300.0  # seconds for processes to start and train a step, beside those of the measurement
GRACE = 10.0  # seconds for processes to end
CHECKED = 2  # images of a rank that parity is shown on


@dataclass(frozen=True)
class ScalingJob(SizedJob):
    """A size's training step on so many ranks."""

    ranks: int

    @property
    def job(self) -> Job:
        """What its rows have in common."""
        shape = f"{self.pixels} px, batch {self.batch} per rank"
        name, dtype = label(self.model, self.precision)
        return "scale", f"{name} ranks {self.ranks}", dtype, shape

    def measure(self, settings: Settings) -> list[Row]:
        """One row."""
        extra: dict[str, Any] = {"ranks": self.ranks, "batch": self.batch, "precision": self.precision}
        count = torch.cuda.device_count() if self.device.type == "cuda" else self.ranks
        if count < self.ranks:
            return [self._row(extra | {"absent": f"{self.ranks} ranks need as many GPUs, there are {count}"})]
        found = self.launch(settings)
        if found["wrong"]:
            return [self._row(extra | {"refused": found["wrong"]})]
        timings = {mode: Timing(tuple(samples)) for mode, samples in found["samples"].items()}
        together = timings["together"]
        extra |= {
            "images_per_s": 1e3 * self.batch * self.ranks / together.ms,
            "efficiency": timings["alone"].ms / together.ms,
            "communication_share": max(0.0, 1 - timings["silent"].ms / together.ms),
            "reduction_ms": timings["reduction"].ms,
            "gradient_bytes": found["gradient_bytes"],
            "samples": len(together.samples),
        }
        return [self._row(extra, together)]

    def _row(self, extra: dict[str, Any], timing: Timing | None = None) -> Row:
        row = Row(*self.job[:2], DITFAST, *self.job[2:], extra=extra)
        return row if timing is None else replace(row, ms=timing.ms, ms_p20=timing.p20, ms_p80=timing.p80)

    def launch(self, settings: Settings) -> dict[str, Any]:
        """What the first rank wrote. RuntimeError, with the end of what the processes said, where they fail."""
        with tempfile.TemporaryDirectory(prefix="ditfast-bench-") as folder:
            out = Path(folder) / "out.json"
            worker = [self.model, self.pixels, self.batch, self.precision, self.device.type, settings.rounds]
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)),
                *("-m", "bench.suites.scale", str(out), *map(str, worker), str(settings.seconds)),
            ]
            threads = str(max(1, torch.get_num_threads() // self.ranks))
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path, "TMPDIR": folder}
            # Its other end closes with this process, however that ends.
            alive, here = os.pipe()
            try:
                process = subprocess.Popen(
                    command, env=environment, stdin=alive, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    text=True, start_new_session=True,
                )  # fmt: skip
                try:
                    _, said = process.communicate(timeout=PATIENCE + 10 * settings.seconds)
                finally:
                    os.close(here)
                    _end(process)
            finally:
                os.close(alive)
            if process.returncode or not out.exists():
                raise RuntimeError(f"{self.ranks} ranks ended with {process.returncode}: {said[-2000:]}")
            return json.loads(out.read_text())


def _end(process: subprocess.Popen[str]) -> None:
    """Ends torchrun, and by it the workers."""
    if process.poll() is None:
        process.terminate()
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _end_with_launcher() -> None:
    """Ends this worker when the launcher's end of its standard input closes.

    A worker has a session of its own: nobody's Ctrl-C reaches it, and a torchrun that is killed leaves it behind.
    """

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Ranks:
    """What each process of a launch does, in step with the others."""

    def __init__(self, world: World, together: Trainer, alone: Trainer | None, batch: int):
        self.world, self.together, self.alone = world, together, alone
        self.batch = self._batch(batch, world.rank)
        grads = sum(p.numel() * p.element_size() for p in together.optimizer.parameters.values())
        self.gradient_bytes = grads
        dtype = together.config.precision.grads
        sizes = [min(BUCKET, grads - start) // dtype.itemsize for start in range(0, grads, BUCKET)]
        self.buckets = [torch.ones(size, dtype=dtype, device=world.device) for size in sizes]

    def _batch(self, size: int, seed: int) -> tuple[Tensor, ...]:
        return random_batch(self.together.config.model, size, self.world.device, seed)

    def modes(self) -> dict[str, Callable[[], object]]:
        """What takes turns, by name."""
        return {
            "alone": lambda: self.alone and self.alone.learn(*self.batch),
            "together": lambda: self.together.learn(*self.batch),
            "silent": self._silent,
            "reduction": lambda: [self.world.sum_(bucket) for bucket in self.buckets],
        }

    def _silent(self) -> None:
        with self.together.parallel.no_sync() if self.together.parallel else nullcontext():
            self.together.learn(*self.batch)

    def wrong(self) -> str | None:
        """What is wrong with this rank's update together with all, or on the first rank with its step alone.

        Held against the oracle's of all ranks' batches: the moments show whose gradients were in an update.
        """
        parts = [self._batch(CHECKED, rank) for rank in range(self.world.size)]
        steps = Steps(self.together, tuple(map(torch.cat, zip(*parts, strict=True))))
        part = partial(self.together.learn, *parts[self.world.rank])
        wrong = steps.update().judge(self.together, part)
        return wrong or (steps.judge(self.alone) if self.alone else None)

    def measure(self, rounds: int, seconds: float) -> dict[str, list[float]]:
        """Milliseconds of every mode, in turns, by this rank's clock."""
        modes = self.modes()
        samples: dict[str, list[float]] = {mode: [] for mode in modes}
        for run in modes.values():
            self._timed(run)
        start = time.perf_counter()
        for turn in range(max(rounds, 3)):
            late = self.world.is_main and turn >= 3 and time.perf_counter() - start > seconds
            stop = self.world.any(late)
            self._synchronize()
            if stop:
                break
            for mode, run in modes.items():
                samples[mode].append(self._timed(run))
        return samples

    def _timed(self, run: Callable[[], object]) -> float:
        self._synchronize()
        self.world.barrier()
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return 1e3 * (time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def worker(argv: Sequence[str]) -> None:
    """A process of a launch."""
    _end_with_launcher()
    parser = argparse.ArgumentParser(prog="python -m bench.suites.scale")
    for name, kind in (("out", Path), ("model", str), ("pixels", int), ("batch", int), ("precision", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("device")
    parser.add_argument("rounds", type=int)
    parser.add_argument("seconds", type=float)
    o = parser.parse_args(argv)
    config = model_config(o.model, o.pixels)
    with World.join(o.device) as world:
        by_itself = World(0, 1, world.device)
        first = trainer_for(config, o.batch, o.precision, by_itself) if world.is_main else nullcontext()
        with trainer_for(config, o.batch * world.size, o.precision, world) as together, first as alone:
            ranks = Ranks(world, together, alone, o.batch)
            wrong = ranks.wrong()
            if world.any(bool(wrong)) and wrong is None:
                wrong = "the update of another rank is not the oracle's"
            samples = ranks.measure(o.rounds, o.seconds)
        if world.is_main:
            found = {"wrong": wrong, "samples": samples, "gradient_bytes": ranks.gradient_bytes}
            o.out.write_text(json.dumps(found))


def contests(options: Options) -> Iterator[ScalingJob]:
    """Every number of ranks."""
    model, pixels, batch, precision, ranks = JOBS[options.scale.name]
    for count in ranks:
        yield ScalingJob(model, pixels, batch, precision, options.device, count)


def table(rows: Sequence[Row]) -> str:
    """A line per job."""
    lines = [f"{'job':40}{'dtype':8}{'shape':34}{'ms':>10}{'images/s':>10}{'efficiency':>12}{'communication':>15}"]
    for row in rows:
        rate, shares = row.extra.get("images_per_s"), [row.extra.get(k) for k in ("efficiency", "communication_share")]
        cells = "".join(f"{'-' if value is None else f'{value:.4g}':>10}" for value in (row.ms, rate))
        # Of one rank both would be noise.
        known = row.extra.get("ranks", 0) > 1
        for value, width in zip(shares, (12, 15), strict=True):
            cells += f"{'-' if value is None or not known else f'{value:.0%}':>{width}}"
        lines.append(f"{row.name:40}{row.dtype:8}{row.shape:34}{cells}  {row.why_not or ''}".rstrip())
    return "\n".join(lines)


# By scale: size, pixels, batch of a rank, precision, numbers of ranks.
JOBS: dict[str, tuple[str, int, int, str, tuple[int, ...]]] = {
    "small": ("tiny", 64, 2, "fp32", (2,)),
    "cpu": ("DiT-S/2 of 2 layers", 256, 4, "fp32", (2, 1)),
    "gpu": ("DiT-XL/2", 256, 256, "bf16", (1, 2, 4, 8)),
}

if __name__ == "__main__":
    worker(sys.argv[1:])
