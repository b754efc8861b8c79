"""Rows of measurements and the JSON file that holds them, with one machine object a file."""

import itertools
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from bench.machine import changed
from ditfast.files import replacing

log = logging.getLogger("bench")

# Providers that every suite calls by these names; others have their package's.
DITFAST, EAGER, COMPILE = "ditfast", "eager", "compile"
Job = tuple[str, str, str, str]


@dataclass(frozen=True)
class Row:
    """What one provider needed for one job: (suite, name, dtype, shape).

    ms, ms_p20, ms_p80   median and percentiles in milliseconds; null: not measured, and `extra` says why, under
                         "absent" (cannot run here), "refused" (fails parity) or "failed" (raised)
    ratio_to_compile     torch.compile's ms over this ms: above 1 is faster than torch.compile
    percent_of_limit     of what the measured copy and GEMM rates of this machine allow
    peak_bytes           most memory above what was allocated before
    """

    suite: str
    name: str
    provider: str
    dtype: str
    shape: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ratio_to_compile: float | None = None
    percent_of_limit: float | None = None
    peak_bytes: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        """What is compared: rows of one job differ in the provider."""
        return self.suite, self.name, self.dtype, self.shape

    @property
    def own(self) -> bool:
        """Whether it is ditfast's, or of a variant of it ("ditfast graph")."""
        return self.provider.split()[0] == DITFAST

    @property
    def why_not(self) -> str | None:
        """Why nothing was measured, None for a measured row."""
        return next((f"{key}: {self.extra[key]}" for key in ("absent", "refused", "failed") if key in self.extra), None)


_STRING, _NUMBER, _WHOLE = (str,), (int, float, NoneType), (int, NoneType)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("suite", "name", "provider", "dtype", "shape"), _STRING),
    **dict.fromkeys(("ms", "ms_p20", "ms_p80", "ratio_to_compile", "percent_of_limit"), _NUMBER),
    "peak_bytes": _WHOLE,
    "extra": (dict,),
}
assert list(_TYPES) == [f.name for f in fields(Row)]


@dataclass
class Results:
    """The rows of one machine; `machine` as bench.machine makes it, `limits` a ditfast.hardware.Ceilings as a dict."""

    machine: dict[str, Any]
    limits: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Iterable[Row]) -> None:
        """Enter rows, in place of those of the same job and provider."""
        new = {(*row.job, row.provider): row for row in rows}
        self.rows = [row for row in self.rows if (*row.job, row.provider) not in new] + list(new.values())

    def of(self, job: Job) -> list[Row]:
        """The rows of a job."""
        return [row for row in self.rows if row.job == job]

    def save(self, path: str | Path) -> None:
        """Write the file, or keep what was there if that fails."""
        text = json.dumps({"machine": self.machine, "limits": self.limits, "rows": [asdict(r) for r in self.rows]})
        with replacing(path) as file:
            # A row a line: two results are compared by their diff as well.
            file.write((text.replace('{"suite"', '\n{"suite"') + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """What `save` wrote; ValueError, with the file and the field, for anything else."""
        try:
            tree = json.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"{path}: no results can be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error}); delete it, and measure again") from error
        if not isinstance(tree, dict) or tree.keys() != {"machine", "limits", "rows"}:
            raise ValueError(f"{path}: no results, expected an object with machine, limits and rows")
        for key, kinds in {"machine": (dict,), "limits": (dict, NoneType), "rows": (list,)}.items():
            if not isinstance(tree[key], kinds):
                raise ValueError(f"{path}: {key} is {tree[key]!r}, expected {_named(kinds)}")
        return cls(tree["machine"], tree["limits"], [_row(path, i, row) for i, row in enumerate(tree["rows"])])


def resume(path: str | Path | None, machine: dict[str, Any]) -> Results:
    """The results to go on with: those in the file, if it is there and of this machine and source, else none.

    A file of other versions, threads or source is kept under another name, and that is said. ValueError for a file of
    another device.
    """
    if path is None or not Path(path).exists():
        return Results(machine)
    found = Results.load(path)
    if found.machine.get("device") != machine["device"]:
        raise ValueError(
            f"{path} holds rows of {found.machine.get('device')}, this is {machine['device']}; name another file"
        )
    if not (differences := changed(found.machine, machine)):
        return found
    kept = next(name for i in itertools.count(1) if not (name := Path(f"{path}.{i}")).exists())
    Path(path).rename(kept)
    log.warning("%s: begun anew, what was there is in %s; then and now: %s", path, kept, ", ".join(differences))
    return Results(machine)


def _row(path: str | Path, index: int, row: Any) -> Row:
    where = f"{path}: rows[{index}]"
    if not isinstance(row, dict) or row.keys() != _TYPES.keys():
        raise ValueError(f"{where} is {row!r}, expected an object with {', '.join(_TYPES)}")
    for key, kinds in _TYPES.items():
        value = row[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}.{key} is {value!r}, expected {_named(kinds)}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where}.{key} is {value!r}, expected a finite number from 0")
    return Row(**row)


def _named(kinds: tuple[type, ...]) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
    return " or ".join(names.get(kind, "null") for kind in kinds)
