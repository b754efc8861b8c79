"""Two sets of results against each other: `python -m bench compare A.json B.json`, or `--base REV SUITE`.

A row is slower (faster) when its p20 to p80 lies wholly above (below) the other's: what scatters that far is called
"same". `--fail-above` makes the exit status 1 where a row of ditfast is slower by more than that, needs that much more
memory, or is not there or not measured (refused by its parity check, failed) where it was before. Others' rows are told
and not judged: what changed of them is the machine.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.rows import Results, Row

Key = tuple[Any, ...]


def key_of(row: Row) -> Key:
    """What makes rows of two files the same measurement."""
    return (*row.job, row.provider)


@dataclass(frozen=True)
class Change:
    """One row in both files. ratio: new ms over old, above 1 is slower; None where one of them has no time."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float | None:
        return self.new.ms / self.old.ms if self.old.ms and self.new.ms else None

    @property
    def memory(self) -> float | None:
        """New peak bytes over old; None where one of them was not measured."""
        return self.new.peak_bytes / self.old.peak_bytes if self.old.peak_bytes and self.new.peak_bytes else None

    @property
    def verdict(self) -> str:
        """slower, faster or same; else why there is no ratio."""
        if self.ratio is None:
            lost = "not measured" + (" now" if self.old.ms is not None else "")
            return lost if self.new.why_not is None else self.new.why_not.partition(":")[0]
        if _low(self.new) > _high(self.old):
            return "slower"
        return "faster" if _high(self.new) < _low(self.old) else "same"

    def regressed(self, allowed: float) -> bool:
        """Whether ditfast's row is slower, or larger, by more than the share `allowed`, or not measured any more."""
        slower = self.verdict == "slower" and (self.ratio or 0) > 1 + allowed
        lost = self.old.why_not is None and (self.new.why_not is not None or bool(self.old.ms and not self.new.ms))
        return self.new.own and (slower or lost or (self.memory or 0) > 1 + allowed)


def _low(row: Row) -> float:
    return row.ms_p20 if row.ms_p20 is not None else row.ms or 0.0


def _high(row: Row) -> float:
    return row.ms_p80 if row.ms_p80 is not None else row.ms or 0.0


@dataclass(frozen=True)
class Comparison:
    """Two files' rows matched: `changes` in the new file's order, and what only one of them has."""

    changes: list[Change]
    only_old: list[Row]
    only_new: list[Row]

    @property
    def lost(self) -> list[Row]:
        """Rows of ditfast that were measured and are not there any more."""
        return [row for row in self.only_old if row.own and row.why_not is None]

    def regressed(self, allowed: float) -> bool:
        """Whether a row regressed by more than the share `allowed`, or is lost."""
        return bool(self.lost) or any(change.regressed(allowed) for change in self.changes)


def match(old: Results, new: Results) -> Comparison:
    """Pairs the rows of two results."""
    before = {key_of(row): row for row in old.rows}
    after = {key_of(row): row for row in new.rows}
    return Comparison(
        [Change(before[key], row) for key, row in after.items() if key in before],
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
    )


def pooled(rounds: Sequence[Results]) -> Results:
    """Rounds of the same rows as one: the median of their medians, and the p20 and p80 of all their percentiles."""
    rows: dict[Key, list[Row]] = {}
    for results in rounds:
        for row in results.rows:
            rows.setdefault(key_of(row), []).append(row)
    return replace(rounds[0], rows=[_pool(same) for same in rows.values()])


def _pool(same: list[Row]) -> Row:
    timed = [row for row in same if row.ms is not None]
    if len(timed) < len(same) or len(timed) < 2:
        return next((row for row in same if row.ms is None), same[0])
    values = [value for row in timed for value in (_low(row), row.ms or 0.0, _high(row))]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    peaks = [row.peak_bytes for row in timed if row.peak_bytes is not None]
    return replace(
        same[0], ms=statistics.median(row.ms or 0.0 for row in timed), ms_p20=fifths[0], ms_p80=fifths[-1],
        peak_bytes=max(peaks, default=None),
    )  # fmt: skip


def report(comparison: Comparison, allowed: float | None) -> str:
    """The comparison as a table for a terminal, regressions marked with "!"."""
    lines = [("", "suite", "name", "provider", "dtype", "old ms", "new ms", "new/old", "memory", "")]
    for change in comparison.changes:
        row, mark = change.new, "!" if allowed is not None and change.regressed(allowed) else ""
        lines.append((
            mark, row.suite, row.name, row.provider, row.dtype, _number(change.old.ms), _number(row.ms),
            _ratio(change.ratio), _ratio(change.memory), change.verdict,
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = {5, 6, 7, 8}
    text = [
        " ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    for where, rows in (("old", comparison.only_old), ("new", comparison.only_new)):
        lost = comparison.lost if where == "old" and allowed is not None else []
        text += [
            f"{'! ' if row in lost else ''}only in the {where} file: {row.suite} {row.name} {row.provider} {row.dtype}"
            for row in rows
        ]
    ratios = [change.ratio for change in comparison.changes if change.ratio]
    if ratios:
        text.append(f"{len(ratios)} rows compared, geometric mean of new/old {statistics.geometric_mean(ratios):.3f}")
    return "\n".join(line.rstrip() for line in text)


def _number(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.4g}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def percent(text: str) -> float:
    """A share from "5%" or "0.05"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000 or (value >= 1 and not text.endswith("%")):
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields that two machines differ in, as text; what always differs aside."""
    fields = [name for name in {**old, **new} if name not in ("commit", "source", "date", "clocks")]
    return [f"{name}: {old.get(name)} and {new.get(name)}" for name in fields if old.get(name) != new.get(name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Compares and prints; 1 with a regression, 2 where there is nothing sound to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="A.json B.json", help="old and new results")
    parser.add_argument("--base", metavar="REV", help="measure this commit and the working tree, in turns")
    parser.add_argument("--rounds", type=int, default=3, help="with --base: how often each is measured")
    parser.add_argument("--seconds", type=float, default=120, help="with --base: for each suite run")
    parser.add_argument("--fail-above", type=percent, metavar="5%", help="exit with 1 for a worse row than that")
    parser.add_argument("--force", action="store_true", help="compare results of different devices all the same")
    # What is not known here goes to the suite: SUITE itself, --only, --small, --device.
    options, rest = parser.parse_known_args(argv)
    try:
        if options.base is not None:
            from bench.__main__ import parser as suite_parser
            from bench.revisions import measure_in_turns

            if suite := [*options.files, *rest]:
                suite_parser().parse_args(suite)
            old, new = measure_in_turns(options.base, suite, rounds=options.rounds, seconds=options.seconds)
        else:
            old, new = _read_both(options.files, rest)
            devices = [results.machine.get("device") for results in (old, new)]
            if devices[0] != devices[1] and not options.force:
                raise ValueError(
                    f"the files come from {devices[0]} and {devices[1]}, and times of different devices say nothing "
                    "about a change; --force compares them all the same"
                )
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    for line in differences(old.machine, new.machine):
        print(f"the machines differ in {line}")
    comparison = match(old, new)
    print(report(comparison, options.fail_above))
    if not comparison.changes:
        print("error: the files have no row in common")
        return 2
    return int(options.fail_above is not None and comparison.regressed(options.fail_above))


def _read_both(files: Sequence[str], rest: Sequence[str]) -> tuple[Results, Results]:
    if len(files) != 2 or rest:
        given = " ".join([*files, *rest]) or "nothing"
        raise ValueError(f"expected two result files, or --base REV SUITE; got {given}")
    old, new = (Results.load(Path(file)) for file in files)
    return old, new
