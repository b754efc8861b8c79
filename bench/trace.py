"""A training step as a timeline: `python -m bench.trace --out DIR`, for chrome://tracing or ui.perfetto.dev.

With --range it profiles nothing itself, but marks one step for `ncu --profile-from-start off`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.training import model_config, random_batch, trainer_for
from ditfast.distributed import World

STEPS = 2


def trace(step: Callable[[], object], device: torch.device, folder: Path, name: str) -> list[Path]:
    """Writes NAME.trace.json.gz, the timeline of some steps, and NAME.ops.txt, their time by op; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        for _ in range(STEPS):
            step()
        _wait(device)
    timeline, ops = folder / f"{name}.trace.json.gz", folder / f"{name}.ops.txt"
    profiler.export_chrome_trace(str(timeline))
    key = f"self_{device.type}_time_total"
    ops.write_text(profiler.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=80))
    return [timeline, ops]


def mark(step: Callable[[], object], device: torch.device) -> None:
    """Runs a step between the marks that ncu waits for."""
    torch.cuda.profiler.start()
    step()
    _wait(device)
    torch.cuda.profiler.stop()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Traces, or marks, after steps that warm up."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=__doc__)
    parser.add_argument("--model", default="DiT-XL/2", help="DiT-XL/2, ..., or tiny")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="bf16-fast")
    parser.add_argument("--recompute", default="ops")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), help="folder for the files")
    parser.add_argument("--range", action="store_true", help="mark a step for ncu, trace nothing")
    parser.add_argument("--device", help="cuda, cpu; a GPU where there is one")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = model_config(options.model)
    with trainer_for(
        config, options.batch, options.precision, World(0, 1, device), recompute=options.recompute
    ) as trainer:
        batch = random_batch(config, options.batch, device)
        for _ in range(3):
            trainer.learn(*batch)
        _wait(device)
        if options.range:
            mark(lambda: trainer.learn(*batch), device)
            return 0
        name = f"{options.model.replace('/', '-')}-{options.batch}-{options.precision}"
        for path in trace(lambda: trainer.learn(*batch), device, options.out, name):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
