"""What a run reports: a progress bar, a JSONL file, TensorBoard, and the rates derived from a window of steps."""

import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ditfast.config import Precision
from ditfast.distributed.world import is_main_process
from ditfast.files import replacing
from ditfast.hardware import find_gpu, rate_name

log = logging.getLogger("ditfast")
console = Console(stderr=True)  # one for log and progress bar, or they would write over each other


def setup_logging() -> None:
    """Sends the "ditfast" logger to the terminal; processes other than the main one only warn."""
    handler: logging.Handler = RichHandler(console=console, show_path=False, show_time=False)
    if not console.is_terminal:
        handler = logging.StreamHandler()  # whole lines for files and pipes
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    log.propagate = False


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Peak FLOP/s of the device by datasheet for this precision, or None where it is not known (CPUs, fp32)."""
    name = rate_name(precision)
    if device.type != "cuda" or name == "fp32":
        return None
    found = find_gpu(torch.cuda.get_device_name(device))
    peak = getattr(found, name, None)
    return peak and 1e12 * peak


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LossWindow:
    """Sums of the losses since the last reading, in all and by timestep in 0 .. num_timesteps; 1 for real times."""

    TERMS = ("loss", "mse", "vb", "cos")  # a new one goes last: checkpoints hold the sums in this order
    BINS = 10  # equal slices of the timesteps

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        self.terms: list[str] = []
        self.sums = torch.zeros(len(self.TERMS) + 2 * self.BINS, dtype=torch.float64, device=device)
        self._bins = torch.arange(self.BINS, device=device)[:, None]

    def add(self, t: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """Adds timesteps t (B,), their importance weights (B,), and their losses (B,) by name."""
        self.terms = [name for name in self.TERMS if name in terms]
        zero = self.sums.new_zeros(())
        totals = [(terms[name].double() * weights).sum() if name in terms else zero for name in self.TERMS]
        member = self._bins == (t * self.BINS // self.num_timesteps).clamp(max=self.BINS - 1)  # t = 1 is in the last
        # Not a matrix product: an infinite loss must not reach the other bins as 0 * inf.
        losses = torch.where(member, terms["loss"].double(), zero).sum(dim=1)
        self.sums += torch.cat([torch.stack(totals), losses, member.sum(dim=1)])

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means over the window, after `reduce` has summed the sums over all processes; None for an empty bin.

        Weighted means of every term estimate the mean over uniform timesteps, however they were drawn. A bin is a plain
        mean.
        """
        sums = reduce(self.sums).tolist()
        self.sums.zero_()
        totals, losses, counts = sums[: len(self.TERMS)], sums[-2 * self.BINS : -self.BINS], sums[-self.BINS :]
        means = {name: _mean(total, sum(counts)) for name, total in zip(self.TERMS, totals, strict=True)}
        bins = [_mean(a, b) for a, b in zip(losses, counts, strict=True)]
        return {name: means[name] for name in self.terms} | {"loss_bins": bins}

    def gather(self, reduce: Callable[[Tensor], Tensor], keep: bool) -> Tensor:
        """Moves the sums of all processes to the one that says `keep`, for a checkpoint; returns them."""
        total = reduce(self.sums.clone())
        self.sums = total if keep else torch.zeros_like(total)
        return total

    def load(self, sums: Tensor) -> None:
        """Goes on from gathered sums; an older ditfast's have none of the last terms."""
        known = len(sums) - 2 * self.BINS
        self.sums[:known], self.sums[-2 * self.BINS :] = sums[:known], sums[known:]


def _mean(total: float, count: float) -> float | None:
    """None where there is nothing to average or an overflow, which JSON has no number for."""
    return total / count if count and math.isfinite(total) else None


class Meter:
    """Wall time and data wait of the steps since the last reading."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block is not the steps'."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - began

    def read(self, images_per_step: int, flops_per_image: int, peak: float | None) -> dict[str, float]:
        """images_per_s, step_ms, data_wait (share of the time), and mfu where `peak` (FLOP/s, all devices) is known."""
        seconds, steps = time.perf_counter() - self.start, max(self.steps, 1)
        rate = images_per_step * steps / seconds
        rates = {"images_per_s": rate, "step_ms": 1e3 * seconds / steps, "data_wait": self.waited / seconds}
        if peak is not None:
            rates["mfu"] = rate * flops_per_image / peak
        self.reset()
        return rates


class Recorder:
    """Writes one record per logged step to `log.jsonl`, TensorBoard and the progress bar, or the log where that is no
    terminal. Silent where not `enabled`.
    """

    def __init__(self, directory: Path, total: int, start: int, *, enabled: bool, tensorboard: bool):
        self.enabled, self.total = enabled, total
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "log.jsonl"
        _drop_records_after(self.path, start)
        self.file = self.path.open("a")
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 2 s to import

            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self.progress = Progress(
            TextColumn("train"), BarColumn(bar_width=12), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=total, completed=start, figures="")
        self.progress.start()

    def advance(self, step: int) -> None:
        if self.enabled:
            self.progress.update(self.task, completed=step)

    def write(self, record: dict[str, Any]) -> None:
        """A flat record with "step"; lists (loss bins) go to TensorBoard one scalar an entry."""
        if not self.enabled:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in record.items():
                for i, entry in enumerate(value if isinstance(value, list) else [value]):
                    if name != "step" and entry is not None:
                        self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, entry, record["step"])
        self.progress.update(self.task, figures=summary(record))
        if not console.is_terminal:
            log.info("step %d of %d: %s", record["step"], self.total, summary(record))

    def image(self, name: str, path: Path, step: int) -> None:
        """Adds a PNG to TensorBoard."""
        if self.enabled and self.board is not None:
            with Image.open(path) as picture:
                self.board.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Stops the bar and closes the files; what a full disk refuses now was refused, and reported, before."""
        if self.enabled:
            self.progress.stop()
            with suppress(OSError):
                self.file.close()
            with suppress(OSError):
                if self.board is not None:
                    self.board.close()


def summary(record: dict[str, Any]) -> str:
    """One line of a record for the progress bar."""
    loss = "overflow" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"loss {loss}", f"{record['images_per_s']:.1f} img/s"]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts += [f"{record['peak_bytes'] / 2**30:.2f} GiB", f"data wait {record['data_wait']:.0%}"]
    return " ".join(parts)


def _drop_records_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint; their first records go, so that each step is there once."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _is_record_until(line, step)]
    if kept != lines:
        with replacing(path) as file:
            file.write("".join(kept).encode())


def _is_record_until(line: str, step: int) -> bool:
    """False for a later record, and for the half-written last line of a killed run."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
