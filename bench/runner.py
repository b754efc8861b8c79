"""Runs a suite: goes on from a file, ends in time, passes over what fails, and gives a short table."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.contest import Settings, told
from bench.rows import COMPILE, DITFAST, EAGER, Job, Results, Row
from bench.suites import Piece

log = logging.getLogger("bench")


class NoSuchJob(ValueError):
    """No job of a suite is of the name that was asked for."""


def run(
    pieces: Iterable[Piece],
    results: Results,
    settings: Settings,
    *,
    seconds: float = float("inf"),
    only: str = "",
    retry: bool = False,
    path: str | Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measures the pieces that `results` lacks and enters their rows; returns how many are left for want of time.

    only   a regular expression that a piece's job, joined by spaces, must contain
    retry  whether pieces with rows of what could not run here are measured too; those that raised always are, last
    path   where the results are saved after every piece
    A piece that raises is a row that says so. None is begun that would not end in time if it took as long as the
    longest so far. NoSuchJob where there is none of that name.
    """
    deadline, longest, left = clock() + seconds, 0.0, 0
    pieces = list(pieces)
    asked = [piece for piece in pieces if re.search(only, " ".join(piece.job))]
    if pieces and not asked:
        raise NoSuchJob(f"--only {only}: no job is of that name; there are {', '.join(_names(pieces))}")
    again = {"failed", "absent", "refused"} if retry else {"failed"}
    undone = [piece for piece in asked if any(row.extra.keys() & again for row in results.of(piece.job))]
    for piece in [*(piece for piece in asked if not results.of(piece.job)), *undone]:
        start = clock()
        if start + longest > deadline:
            left += 1
            continue
        try:
            rows = piece.measure(settings)
        except Exception as error:
            suite, name, dtype, shape = piece.job
            rows = [Row(suite, name, DITFAST, dtype, shape, extra={"failed": told(error)})]
        longest = max(longest, clock() - start)
        results.add(rows)
        log.info("%s: %.0f s", " ".join(piece.job), clock() - start)
        if path is not None:
            results.save(path)
    return left


def _names(pieces: Iterable[Piece]) -> list[str]:
    return list(dict.fromkeys(piece.job[1] for piece in pieces))


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows of ditfast itself, its variants ("ditfast graph") among them, that were refused or failed."""
    return [row for row in rows if row.own and row.extra.keys() & {"refused", "failed"}]


def table(rows: Sequence[Row]) -> str:
    """A line per job: ditfast's milliseconds, how many times as fast as others it is, and what was not measured."""
    jobs = dict[Job, dict[str, Row]]()
    for row in rows:
        jobs.setdefault(row.job, {})[row.provider] = row
    head = ("job", "dtype", "shape", "ditfast ms", "x eager", "x compile", "x fastest other", "% of limit", "MB", "")
    lines = [head, *(_line(job, found) for job, found in jobs.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _line(job: Job, found: dict[str, Row]) -> tuple[str, ...]:
    _, name, dtype, shape = job
    own = found.get(DITFAST) or next(iter(found.values()))
    others = {p: row for p, row in found.items() if row.ms is not None and p not in (own.provider, EAGER, COMPILE)}
    best = min(others, key=lambda provider: others[provider].ms or 0, default=None)
    notes = [f"{p} {row.why_not}" for p, row in found.items() if row.why_not and "absent" not in row.extra]
    return (
        *(name, dtype, shape, "-" if own.ms is None else f"{own.ms:.4g}"),
        *(_ratio(found.get(EAGER), own), _ratio(found.get(COMPILE), own)),
        f"{_ratio(others[best], own)} {best}" if best else "-",
        "-" if own.percent_of_limit is None else f"{own.percent_of_limit:.0f}",
        "-" if own.peak_bytes is None else f"{own.peak_bytes / 1e6:.1f}",
        "; ".join(notes)[:80],
    )


def _ratio(other: Row | None, own: Row) -> str:
    return "-" if other is None or other.ms is None or own.ms is None else f"{other.ms / own.ms:.2f}"
