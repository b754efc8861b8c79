"""The model of a step held against measured rows, those of bench's suite "model"."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditfast.build import build_model
from ditfast.config import PRECISIONS, ConfigError, config_from
from ditfast.files import replacing
from ditfast.hardware import Ceilings
from ditfast.plan.memory import policy_memory, state
from ditfast.plan.step import Share, rates, step_time
from ditfast.plan.text import aligned

# What a row's `extra` must say for its step to be predicted: its model's options, images a step, names of the policies.
NEEDED = ("network", "batch", "precision", "recompute")


@dataclass(frozen=True)
class Comparison:
    """A measured row beside its prediction; errors are predicted over measured, less one. None: not measured."""

    name: str
    machine: str
    measured_ms: float
    predicted_ms: float
    measured_bytes: int | None
    predicted_bytes: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1

    @property
    def memory_error(self) -> float | None:
        return self.predicted_bytes / self.measured_bytes - 1 if self.measured_bytes else None


def compare(path: Path) -> tuple[list[Comparison], list[str]]:
    """(comparisons, what was passed over and why) of a results file; ConfigError for a file that is none."""
    try:
        tree = json.loads(path.read_text())
        rows, limits, on_gpu = tree["rows"], tree["limits"], tree["machine"]["kind"] == "cuda"
        own = [row for row in rows if row["suite"] == "model" and row["provider"] == "ditfast"]
        ceilings = None if limits is None else Ceilings(**limits)
        named = [(row, f"{path.name}: {row['name']} {row['dtype']}", row["extra"]) for row in own]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} holds no results of python -m bench ({type(error).__name__}: {error})") from error
    if not own:
        return [], [f"{path.name}: no rows of suite 'model' by ditfast"]
    if ceilings is None:
        return [], [f"{path.name}: it has no measured limits; measure anew, by python -m bench model --json FILE"]
    found, passed_over = [], []
    for row, name, extra in named:
        missing = [key for key in NEEDED if key not in extra]
        if row["ms"] is None or missing:
            passed_over.append(f"{name}: " + (f"no {', '.join(missing)} in extra" if missing else "was not measured"))
        else:
            found.append(_comparison(name, row, ceilings, on_gpu))
    return found, passed_over


def _comparison(name: str, row: dict[str, Any], ceilings: Ceilings, on_gpu: bool) -> Comparison:
    extra = row["extra"]
    if extra["precision"] not in PRECISIONS:
        raise ConfigError(f"{name}: precision must be one of {', '.join(PRECISIONS)}, got {extra['precision']!r}")
    try:
        config = config_from({"process": extra.get("process", "ddpm"), "model": extra["network"]}).model
    except ConfigError as error:
        raise ConfigError(f"{name}: extra.network holds no options of a model ({error})") from error
    with torch.device("meta"):
        model = build_model(config)
    precision, images = PRECISIONS[extra["precision"]], extra["batch"]
    time = step_time(model, precision, extra["recompute"], Share(images), rates(ceilings, precision))
    kept = policy_memory(model, precision, extra["recompute"], images, fused=on_gpu)
    held = state(model, precision)
    # Above what is there before a step: autocast's copies, and first activations, then gradients in their place.
    peak = held.copies + max(kept.activations + kept.working, held.gradients)
    return Comparison(name, ceilings.machine, row["ms"], time.total, row["peak_bytes"], peak)


def print_comparisons(found: list[Comparison], passed_over: list[str]) -> None:
    """By machine a line per row, with the errors in percent."""
    head = ("ms", "predicted", "error", "MB", "predicted", "error", "row")
    for machine in dict.fromkeys(each.machine for each in found):
        print(f"Held against rows measured on {machine}")
        print(aligned([head, *(_line(each) for each in found if each.machine == machine)]))
    for line in passed_over:
        print(f"not compared: {line}")


def _line(each: Comparison) -> tuple[str, ...]:
    memory = "-" if each.measured_bytes is None else f"{each.measured_bytes / 1e6:,.1f}"
    error = "" if each.memory_error is None else f"{each.memory_error:+.0%}"
    time = (f"{each.measured_ms:.1f}", f"{each.predicted_ms:.1f}", f"{each.error:+.0%}")
    return *time, memory, f"{each.predicted_bytes / 1e6:,.1f}", error, each.name


def save_comparisons(found: list[Comparison], path: Path) -> None:
    """The comparisons as JSON, under "against" as in a plan's."""
    with replacing(path) as file:
        file.write((json.dumps({"against": as_json(found)}, indent=1) + "\n").encode())


def as_json(found: list[Comparison]) -> list[dict[str, Any]]:
    """The comparisons with their errors."""
    return [asdict(each) | {"error": each.error, "memory_error": each.memory_error} for each in found]
