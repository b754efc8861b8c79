"""The tables of PERFORMANCE.md from result files, and their places in it.

A place is `<!-- bench:NAME -->` to `<!-- bench:end -->`; one named "picture NAME" is for one of figures.py's.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compare import differences
from bench.machine import ROOT
from bench.report.figures import FIGURES
from bench.report.markdown import NOT_MEASURED, megabytes, number, percent, table
from bench.report.targets import DEVICE, targets
from bench.rows import COMPILE, DITFAST, EAGER, Job, Results, Row
from bench.tables import fast_dit, mindone
from ditfast.hardware import Ceilings

RESULTS, PLACES = ROOT / "bench" / "results", Path("docs") / "bench"
# Name of a figure -> what it shows, for those who do not see it.
PICTURES = {
    "breakdown": "Milliseconds of a training step by kernel class",
    "roofline": "Every op's traffic against a copy, and those with matrix products under the roof",
    "ratios": "Every op's speed over torch.compile",
    "steps": "Training steps and sampling: speed over torch.compile by provider",
    "memory": "Activation bytes by recompute policy, measured and estimated",
    "scaling": "Images per second by ranks",
}
# What `extra` of a suite's measured rows must have, to be put into tables and pictures.
NEEDED = {
    "ops": ("pass",), "breakdown": ("classes",), "memory": ("policy",),
    "scale": ("ranks", "images_per_s", "efficiency"), "fast-dit": ("steps_per_s", "state_bytes"),
}  # fmt: skip
PLACE = re.compile(r"(<!-- bench:(?P<name>[\w -]+?) -->\n).*?(?P<end><!-- bench:end -->)", re.DOTALL)


@dataclass
class Section:
    """All that was measured on one device: its machine objects, one a file, the limits, and the rows."""

    device: str
    machines: list[dict[str, Any]] = field(default_factory=list)
    limits: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)

    def of(self, suite: str) -> list[Row]:
        """The rows of a suite."""
        return [row for row in self.rows if row.suite == suite]


def sections(found: Iterable[Results]) -> list[Section]:
    """The results by device; of a row in several files the last counts.

    ValueError where these were of machines that differ: of their rows none may stand for the other's.
    """
    made: dict[str, Section] = {}
    origin: dict[tuple[str, Job, str], dict[str, Any]] = {}
    for results in found:
        name = str(results.machine.get("device"))
        section = made.setdefault(name, Section(name))
        for row in results.rows:
            before = origin.setdefault((name, row.job, row.provider), results.machine)
            if apart := differences(before, results.machine):
                raise ValueError(
                    f"two files have {row.suite} {row.name} by {row.provider} on {name}, of machines that differ in "
                    f"{', '.join(apart)}; name one of them"
                )
        section.machines.append(results.machine)
        section.limits = Ceilings(**results.limits) if results.limits else section.limits
        joined = Results(results.machine, rows=section.rows)
        joined.add(results.rows)
        section.rows = joined.rows
    return list(made.values())


def load(files: Sequence[Path]) -> list[Section]:
    """`sections` of result files; ValueError with the file for what is none, or lacks what a table is made of."""
    return sections(map(_load, files))


def _load(path: Path) -> Results:
    results = Results.load(path)
    try:
        if results.limits is not None:
            Ceilings(**results.limits)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: limits are none that python -m bench limits measures ({error})") from error
    for i, row in enumerate(results.rows):
        missing = [key for key in NEEDED.get(row.suite, ()) if row.why_not is None and key not in row.extra]
        if missing:
            raise ValueError(f"{path}: rows[{i}].extra of suite {row.suite} lacks {', '.join(missing)}")
    return results


def committed() -> list[Path]:
    """The result files in bench/results; the ledgers beside them are others."""
    return [path for path in sorted(RESULTS.glob("*.json")) if '"rows"' in path.read_text()]


def picture(section: Section, name: str) -> Path:
    """Where a page finds a device's picture, from the root of the repository."""
    device = re.sub(r"[^a-z0-9]+", "-", section.device.lower()).strip("-")
    return PLACES / f"{device}-{name}.png"


def jobs(rows: Iterable[Row]) -> dict[Job, dict[str, Row]]:
    """Rows by job and provider."""
    found: dict[Job, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.job, {})[row.provider] = row
    return found


def times(row: Row | None) -> str:
    """Median milliseconds and their p20 to p80, or why there are none."""
    if row is None or row.ms is None:
        return "-" if row is None else (row.why_not or NOT_MEASURED).partition(":")[0]
    return f"{number(row.ms)} ({number(row.ms_p20)} to {number(row.ms_p80)})"


def faster(other: Row | None, own: Row | None) -> str:
    """How many times as fast `own` is."""
    return f"{other.ms / own.ms:.2f}" if other and own and other.ms and own.ms else "-"


def machine(section: Section) -> str:
    """What it was measured on; where files differ in it, all of that."""
    limits = section.limits

    def told(*keys: str, by: str = "; ") -> str:
        return by.join(dict.fromkeys(", ".join(str(m.get(key) or "-") for key in keys) for m in section.machines))

    gemm = ", ".join(f"{dtype} {number(1e3 * rate)}" for dtype, rate in limits.gemm_tflops.items()) if limits else "-"
    lines = [
        ("device", section.device),
        ("cores, threads", told("cores", "threads")),
        ("driver", told("driver")),
        ("torch, triton, python", told("torch", "triton", "python")),
        ("measured copy (GB/s)", number(limits.copy_gbps) if limits else NOT_MEASURED),
        ("measured GEMM (GFLOP/s)", gemm if limits else NOT_MEASURED),
        ("commit", re.sub(r"([0-9a-f]{12})[0-9a-f]*", r"\1", told("commit", by=", "))),
        ("date", told("date", by=", ")),
    ]
    return table(("", "measured on"), lines, left=2)


def steps(section: Section) -> str:
    """The training steps, a line for each provider."""
    lines = []
    for (_, name, dtype, shape), found in jobs(section.of("model")).items():
        for provider, row in found.items():
            ratio = "-" if row.ratio_to_compile is None else f"{row.ratio_to_compile:.2f}"
            extra, mfu = row.extra, row.extra.get("mfu")
            lines.append((
                name, dtype, shape, provider, times(row), number(extra.get("images_per_s")), percent(mfu), ratio,
                megabytes(row.peak_bytes), number(extra.get("joules_per_image")),
            ))  # fmt: skip
    head = (
        "model",
        "dtype",
        "shape",
        "provider",
        "ms (p20 to p80)",
        "images/s",
        "MFU",
        "x compile",
        "step's MB",
        "J/image",
    )
    return table(head, [line for line in lines if not line[4].startswith("absent")], left=4)


def where(section: Section) -> str:
    """ditfast's step by kernel class, beside the eager reference's and what the limits allow."""
    parts = []
    for (_, name, dtype, shape), found in jobs(section.of("breakdown")).items():
        own, eager = found.get(DITFAST), found.get(EAGER)
        if own is None or own.ms is None:
            continue
        least, total = own.extra.get("least_ms") or {}, own.ms
        lines = []
        rivals = eager.extra["classes"] if eager and eager.ms else {}
        for kind, ms in own.extra["classes"].items():
            # A class without time was found in other ops, or does not occur: nothing is known of it.
            share = percent(ms / total) if ms else "-"
            lines.append((kind, number(ms or None), share, number(rivals.get(kind) or None), number(least.get(kind))))
        # Not of every class there is a limit.
        floor = f"at least {number(sum(least.values()))}" if least else "-"
        whole = number(total), "100%", number(eager.ms) if eager else "-", floor
        head = (f"{name}, {dtype}, {shape}", "ms", "share", "eager ms", "ms at the limits")
        parts.append(table(head, [*lines, ("whole step, profiled", *whole)]))
    return "\n\n".join(parts) or NOT_MEASURED


def gains(section: Section) -> str:
    """In words: where a step's time goes, and what is farthest above the measured limits."""
    parts = []
    for (_, name, dtype, _), found in jobs(section.of("breakdown")).items():
        own = found.get(DITFAST)
        if own is None or not own.ms or not own.extra.get("least_ms"):
            continue
        classes, least = own.extra["classes"], own.extra["least_ms"]
        first = sorted(classes, key=lambda kind: -classes[kind])[:3]
        taken = ", ".join(f"{kind} {classes[kind] / own.ms:.0%}" for kind in first)
        above = {kind: classes[kind] - floor for kind, floor in least.items()}
        order = sorted(above, key=lambda kind: -above[kind])[:3]
        won = "; ".join(f"{k} {number(classes[k])} ms where the limit is {number(least[k])}" for k in order)
        parts.append(
            f"- {name}, {dtype}: the time goes to {taken}. The largest distances to the limits, and so the next gains: "
            f"{won}."
        )
    return "\n".join(parts) or NOT_MEASURED


def ops(section: Section) -> str:
    """Every op: ditfast's milliseconds, and how many times as fast as eager and torch.compile it is."""
    lines = []
    for (_, name, dtype, _), found in jobs(section.of("ops")).items():
        own = found.get(DITFAST)
        limit = "-" if own is None or own.percent_of_limit is None else f"{own.percent_of_limit:.0f} %"
        case = (own.extra.get("case") if own else None) or "-"
        rivals = {p: r for p, r in found.items() if r.ms and p not in (DITFAST, EAGER, COMPILE)}
        best = min(rivals, key=lambda p: rivals[p].ms or 0, default=None)
        lines.append((
            name, case, dtype, times(own), faster(found.get(EAGER), own), faster(found.get(COMPILE), own),
            f"{faster(rivals[best], own)} {best}" if best else "-", limit,
        ))  # fmt: skip
    head = ("op", "case", "dtype", "ms (p20 to p80)", "x eager", "x compile", "x fastest other", "of the limit")
    return table(head, lines, left=3)


def sampling(section: Section) -> str:
    """Milliseconds per image by sampler and provider."""
    lines = []
    for (_, name, dtype, shape), found in jobs(section.of("sample")).items():
        for provider, row in found.items():
            each = number(row.extra.get("ms_per_image")) if row.ms is not None else times(row)
            ratio = "-" if row.ratio_to_compile is None else f"{row.ratio_to_compile:.2f}"
            lines.append((name, dtype, shape, provider, each, ratio))
    return table(("sampling", "dtype", "shape", "provider", "ms per image", "x compile"), lines, left=4)


def memory(section: Section) -> str:
    """Activation bytes per token and layer, beside the estimate."""
    lines = []
    for row in section.of("memory"):
        measured, estimate = row.extra.get("bytes_per_token_layer"), row.extra.get("estimate_per_token_layer")
        error = "-" if not measured or estimate is None else f"{estimate / measured - 1:+.1%}"
        lines.append((row.name, row.dtype, row.provider, number(measured), number(estimate), error))
    head = ("policy", "dtype", "provider", "bytes per token and layer", "estimate", "error")
    return table(head, lines, left=3)


def scaling(section: Section) -> str:
    """Data-parallel ranks; one has nobody to communicate with, nor to be compared to."""
    lines = []
    for row in section.of("scale"):
        extra = row.extra if row.extra.get("ranks") != 1 else {"images_per_s": row.extra.get("images_per_s")}
        lines.append((row.name, row.dtype, row.shape, times(row), number(extra.get("images_per_s")),
                      percent(extra.get("efficiency")), percent(extra.get("communication_share"))))  # fmt: skip
    return table(
        ("ranks", "dtype", "shape", "ms (p20 to p80)", "images/s", "efficiency", "communication"), lines, left=3
    )


def feed(section: Section) -> str:
    """Training with features from disk."""
    lines = []
    for row in section.of("feed"):
        extra = row.extra
        lines.append((row.name, row.dtype, row.shape, row.provider, times(row), number(extra.get("images_per_s")),
                      percent(extra.get("data_wait"))))  # fmt: skip
    return table(("model", "dtype", "shape", "loader", "ms (p20 to p80)", "images/s", "data wait"), lines, left=4)


def fast_dit_table(section: Section) -> str:
    """fast-DiT's, with the sizes measured here."""
    rows = section.of("fast-dit")
    sizes = "; ".join(dict.fromkeys(row.shape for row in rows))
    return f"Measured here: {sizes}.\n\n{fast_dit.table(rows)}"


def mindone_table(section: Section) -> str:
    """MindONE's."""
    return mindone.table(section.of("mindone"))


# By name: the suite whose rows a table has, and the table.
TABLES: dict[str, tuple[str, Callable[[Section], str]]] = {
    "machine": ("", machine), "steps": ("model", steps), "where": ("breakdown", where), "gains": ("breakdown", gains),
    "ops": ("ops", ops), "sampling": ("sample", sampling), "memory": ("memory", memory), "scaling": ("scale", scaling),
    "feed": ("feed", feed), "fast-dit": ("fast-dit", fast_dit_table), "mindone": ("mindone", mindone_table),
}  # fmt: skip


def render(name: str, found: Sequence[Section]) -> str:
    """A table of every device that has it, "not measured" where none does; ValueError for an unknown name."""
    if name == "targets":
        return targets([row for section in found if DEVICE in section.device for row in section.rows])
    if name.startswith("picture "):
        return _pictures(name.removeprefix("picture "), found)
    if name not in TABLES:
        raise ValueError(f"no table {name!r}, there are {', '.join([*TABLES, 'targets'])}")
    suite, make = TABLES[name]
    made = {section.device: make(section) for section in found if not suite or section.of(suite)}
    if len(made) > 1 and suite:
        return "\n\n".join(f"{device}:\n\n{text}" for device, text in made.items())
    return "\n\n".join(made.values()) or NOT_MEASURED


def _pictures(name: str, found: Sequence[Section]) -> str:
    """Links to a figure of every device whose rows it is drawn from."""
    if name not in PICTURES:
        raise ValueError(f"no picture {name!r}, there are {', '.join(PICTURES)}")
    shown = [section for section in found if FIGURES[name](section.rows, section.limits) is not None]
    return "\n".join(f"![{PICTURES[name]}]({picture(section, name)})" for section in shown) or NOT_MEASURED


def fill(text: str, found: Sequence[Section]) -> str:
    """A page with all its places filled; ValueError for a place whose name or end is missing."""
    starts, places = text.count("<!-- bench:") - text.count("<!-- bench:end -->"), len(PLACE.findall(text))
    if starts != places:
        raise ValueError(f"{starts} places begin, but {places} have their <!-- bench:end -->")
    return PLACE.sub(lambda m: f"{m[1]}{render(m['name'], found)}\n{m['end']}", text)
