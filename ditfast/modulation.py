"""The modulation of every sampling step, computed ahead of the loop.

A DiT's modulation depends on the step and the class alone. Computed for many steps at once, the weights of the adaLN
linears are read once instead of in every step (446 MB in bf16 for DiT-XL/2), and once for samples of one class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditfast.diffusion.samplers import at_timestep

# Of one table, while it is made twice: a row of DiT-XL/2 has 0.39 MB in bf16, one for each step and class.
TABLE_BYTES = 128 * 2**20


class ModulationTable:
    """Modulation of samples by their labels, at one step after the other, from a table of as many steps as fit.

    What a call reads stays in its place over all steps and loops, as a CUDA graph needs it.

    Args:
        modulations: timesteps (R,), original ones or a transport's, and labels (R,) -> modulation (R, W), as
            `DiffusionTransformer.modulations`.
        num_labels: labels are 0 .. num_labels - 1.
        most: so many different ones, at most, occur in a loop.
        device: where to compute.
        row_bytes: of one row of W; one for each label of a step is held, of as many steps as fit in `limit` bytes, at
            least one.
    """

    def __init__(
        self,
        modulations: Callable[[Tensor, Tensor], Tensor],
        num_labels: int,
        most: int,
        device: torch.device,
        row_bytes: int,
        limit: int = TABLE_BYTES,
    ):
        self.modulations, self.most, self.device = modulations, most, device
        self.row_bytes, self.limit = row_bytes, limit
        self.timesteps: list[float] = []
        self.classes = torch.empty(0, dtype=torch.int64)
        self._row = torch.empty(num_labels, dtype=torch.int64, device=device)
        self._now: Tensor | None = None

    def begin(self, timesteps: Sequence[float], classes: Tensor) -> None:
        """A loop over timesteps, best in its order, in which the different labels (K,), on the CPU, occur.

        What was computed for the same timesteps and labels stays. ValueError for more labels than `most`.
        """
        if self.timesteps == list(timesteps) and torch.equal(self.classes, classes):
            return
        if len(classes) > self.most:
            raise ValueError(f"{len(classes)} different labels in a loop, but modulation was to be for {self.most}")
        self.timesteps, self.classes = list(timesteps), classes
        self.chunk = max(1, self.limit // (self.row_bytes * len(classes)))
        self._step = {t: i for i, t in enumerate(timesteps)}
        self._timesteps, self._classes = torch.tensor(timesteps, device=self.device), classes.to(self.device)
        row = classes.new_full(self._row.shape, -1)  # which other labels fail at
        row[classes] = torch.arange(len(classes))
        self._row.copy_(row)
        self._first: int | None = None
        self._table = torch.empty(0)

    def go_to(self, t: float) -> None:
        """Chooses the rows of timestep t."""
        step = self._step[t]
        first = step - step % self.chunk
        if first != self._first:
            self._table = torch.empty(0)  # before the next is made: two would be over the limit
            steps, classes = self._timesteps[first : first + self.chunk], self._classes
            with torch.no_grad():
                rows = self.modulations(steps.repeat_interleave(len(classes)), classes.repeat(len(steps)))
            self._table, self._first = rows.view(len(steps), len(classes), -1), first
        rows = self._table[step - first]
        if self._now is None:
            self._now = rows.new_empty(self.most, rows.shape[1])
        self._now[: len(rows)] = rows

    def __call__(self, y: Tensor) -> Tensor:
        """Modulation (B, W) of labels y (B,)."""
        if self._now is None:
            raise ValueError("modulation was asked for before a step was: begin a loop and go to its step first")
        return self._now.index_select(0, self._row[y])


class ByTimestep:
    """A model for the sampling loops, whose networks are told the step before each call: see `samplers.py`."""

    def __init__(self, model: Callable[..., Any], go_to: Sequence[Callable[[float], None]]):
        self.model, self.go_to = model, go_to

    def at_timestep(self, t: float) -> Callable[..., Any]:
        """What to call for a batch that is all at timestep t."""
        for go_to in self.go_to:
            go_to(t)
        return at_timestep(self.model, t)
