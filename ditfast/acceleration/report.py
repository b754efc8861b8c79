"""What `accelerate` took over and what it left, as a table, and the check that those ops run."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ditfast.acceleration.swap import Form
from ditfast.kernels._op import recording_calls

BETWEEN = (
    "Between blocks nothing is fused, since this model's forward calls one after the other: the last residual of a\n"
    "block and the first norm of the next are one op in ditfast's own model only, ditfast.layers.DiT."
)
# Known parts that stay, by the submodules of what holds them.
STAYS = {
    frozenset({"x_embedder", "blocks"}): ("x_embedder", "the model adds pos_embed outside of it"),
    frozenset({"norm_out", "proj_out_1", "proj_out_2"}): (
        "norm_out, proj_out_1, proj_out_2",
        "the model's own forward computes with them",
    ),
}


class Taken(NamedTuple):
    """A module that was taken over."""

    path: str
    module: nn.Module
    form: type[Form]


@dataclass(frozen=True)
class Report:
    """`print` it for the table.

    taken     what was taken over, in the order of model.named_modules()
    left      {path: reason} of what is of a known kind and was not
    backends  {op: backend} on `device` in `dtype`, those of the model's weights when it was accelerated; where shapes
              matter too, `check` tells
    """

    model: nn.Module
    taken: tuple[Taken, ...]
    left: Mapping[str, str]
    backends: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        fused = [(_pattern(path), form.what, self._ops(form)) for path, _, form in self.taken]
        left = [(_pattern(path), reason) for path, reason in (*self.left.items(), *self._stays())]
        parts = [
            f"{type(self.model).__name__} on {self.device} in {str(self.dtype).removeprefix('torch.')}",
            _table(("fused", "what", "ops (backend)"), fused),
            *([_table(("left as it is", "why"), left)] if left else []),
            BETWEEN,
        ]
        return "\n\n".join(parts)

    def check(self, *args: Any, **kwargs: Any) -> dict[str, tuple[tuple[str, str], ...]]:
        """Run model(*args, **kwargs) once, without gradients, and see which ops run in each module taken over.

        Returns {path: ((op, backend), ...)}, ops of submodules under their own path.
        Raises AssertionError where a module runs other ops than its form has, or was not called.
        """
        trace = _Trace()
        device = next(self.model.parameters()).device
        try:
            for part in self.taken:
                trace.follow(part)
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.compiler.set_stance("force_eager"),  # nothing is compiled anew for the recorder
                recording_calls() as trace.calls,
            ):
                self.model(*args, **kwargs)
        finally:
            trace.remove()
        for path, _, form in self.taken:
            if not trace.runs[path]:
                raise AssertionError(f"{path} ({form.what}) was not called")
            for run in trace.runs[path]:
                if (ops := tuple(op for op, _ in run)) != form.ops:
                    ran, expected = ", ".join(ops) or "no op", ", ".join(form.ops)
                    raise AssertionError(f"{path} ({form.what}) ran {ran}, expected {expected}")
        return {path: tuple(runs[0]) for path, runs in trace.runs.items()}

    def _ops(self, form: type[Form]) -> str:
        return ", ".join(f"{op} ({self.backends[op]})" for op in form.ops)

    def _stays(self) -> list[tuple[str, str]]:
        found = []
        for path, module in self.model.named_modules():
            for names, (part, reason) in STAYS.items():
                if names <= module._modules.keys():
                    found.append((f"{path}.{part}" if path else part, reason))
        return found


class _Trace:
    """Which ops each module runs itself, call by call, seen by temporary hooks."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.runs: dict[str, list[list[tuple[str, str]]]] = {}
        self._inside: list[list[tuple[str, str]]] = []
        self._hooks: list[Any] = []

    def follow(self, part: Taken) -> None:
        """Note the calls of one module."""
        runs = self.runs[part.path] = []

        def enter(*_: Any) -> None:
            self._assign()
            runs.append([])
            self._inside.append(runs[-1])

        def leave(*_: Any) -> None:
            self._assign()
            self._inside.pop()

        self._hooks.append(part.module.register_forward_pre_hook(enter))
        self._hooks.append(part.module.register_forward_hook(leave))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _assign(self) -> None:
        """Give the ops since the last boundary to the innermost module."""
        if self._inside:
            self._inside[-1].extend(self.calls)
        self.calls.clear()


def _pattern(path: str) -> str:
    """A path with its numbers left out."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    """Left-aligned columns; equal rows are one, with their count before it."""
    counted = [("", *head), *((str(count), *row) for row, count in Counter(rows).items())]
    widths = [max(map(len, column)) for column in zip(*counted, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in counted)
