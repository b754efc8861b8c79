"""The pictures of a report: where a step's time goes, roofline, ratios to torch.compile, memory by policy, scaling.

Each takes the rows of one machine and its limits, and returns PNG bytes, or None where there is nothing to draw.
"""

from collections.abc import Callable, Sequence
from typing import Any

from bench.report.style import (
    BLUE,
    CLASS_COLOURS,
    DTYPE_COLOURS,
    GREY,
    INK,
    PROVIDER_COLOURS,
    SKY,
    VERMILION,
    WIDTH,
    drawing,
    png,
)
from bench.rows import DITFAST, EAGER, Row
from ditfast.hardware import Ceilings

MARKS, PASSES = {"fwd": "o", "bwd": "^"}, {"fwd": "forward", "bwd": "backward"}
PASS_COLOURS = {"fwd": BLUE, "bwd": SKY}
COARSE, FINE = [2.0**k for k in range(-6, 7)], [0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8]  # ticks of ratios
POINTS = {"textcoords": "offset points"}


def measured(rows: Sequence[Row], *suites: str) -> list[Row]:
    """The rows of these suites that have a time."""
    return [row for row in rows if row.suite in suites and row.ms is not None]


def labels_of(rows: Sequence[Row]) -> list[str]:
    """What an axis calls each row: an op or a job, with the case or shape where it is there in several."""
    names = [row.extra.get("op", row.name) for row in rows]
    details = [row.extra.get("case", row.shape) for row in rows]
    found: dict[str, set[str]] = {}
    for name, detail in zip(names, details, strict=True):
        found.setdefault(name, set()).add(detail)
    return [f"{n}, {d}" if len(found[n]) > 1 else n for n, d in zip(names, details, strict=True)]


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def breakdown(rows: Sequence[Row], limits: Ceilings | None = None) -> bytes | None:
    """Stacked bars: milliseconds of a training step by kernel class, of each provider and at the measured limits."""
    rows = measured(rows, "breakdown")
    if not rows:
        return None
    bars = {f"{row.name}, {row.dtype}\n{row.provider}": row.extra["classes"] for row in rows}
    for row in rows:
        if row.extra.get("least_ms"):
            bars[f"{row.name}, {row.dtype}\nat measured limits"] = row.extra["least_ms"]
    bars = dict(sorted(bars.items(), key=lambda bar: bar[0].partition("\n")[0]))
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(WIDTH, 1.6 + 0.6 * len(bars)))
        longest = max(sum(classes.values()) for classes in bars.values())
        for y, classes in enumerate(bars.values()):
            left = 0.0
            for kind, colour in CLASS_COLOURS.items():
                width = classes.get(kind, 0.0)
                axes.barh(y, width, left=left, color=colour, edgecolor="white", height=0.62, label=None if y else kind)
                if width > 0.05 * longest:
                    ink = "white" if colour in (BLUE, VERMILION) else INK
                    axes.text(left + width / 2, y, short(width), ha="center", va="center", size=9, color=ink)
                left += width
            axes.text(left, y, f"  {short(left)} ms", va="center", size=9, weight="bold")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * longest)
        axes.set(xlabel="profiled time of a training step (ms)", title="Where a training step's time goes")
        figure.legend(loc="outside lower center", ncols=4)
        return png(figure)


def roofline(rows: Sequence[Row], limits: Ceilings | None) -> bytes | None:
    """Left, every op's rate of memory traffic against a copy's; right, FLOP/s over FLOP per byte under the roof."""
    rows = [row for row in measured(rows, "ops") if row.provider == DITFAST and row.extra.get("bytes")]
    if not rows or limits is None:
        return None
    labels = labels_of(rows)
    names = list(dict.fromkeys(labels))
    with drawing() as pyplot:
        size = (1.35 * WIDTH, max(5.0, 1.9 + 0.26 * len(names)))
        figure, (left, right) = pyplot.subplots(1, 2, figsize=size, width_ratios=(1.0, 1.2))
        _bandwidth(left, rows, labels, limits)
        _roof(right, [(label, row) for label, row in zip(labels, rows, strict=True) if row.extra.get("flops")], limits)
        for dtype in dict.fromkeys(row.dtype for row in rows):
            for kind, mark in MARKS.items():
                left.plot([], [], mark, color=DTYPE_COLOURS[dtype], mec="white", ms=8, label=f"{dtype} {PASSES[kind]}")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        return png(figure)


def _point(axes: Any, row: Row, x: float, y: float) -> None:
    axes.plot(x, y, MARKS[row.extra["pass"]], color=DTYPE_COLOURS[row.dtype], ms=8, mec="white", clip_on=False)


def _bandwidth(axes: Any, rows: Sequence[Row], labels: Sequence[str], limits: Ceilings) -> None:
    names = list(dict.fromkeys(labels))
    for label, row in zip(labels, rows, strict=True):
        _point(axes, row, row.extra["bytes"] / (row.ms or 1) / 1e6, names.index(label))
    axes.axvline(limits.copy_gbps, color=INK, lw=1.2, ls="--")
    text = f"copy, {short(limits.copy_gbps)} GB/s"
    axes.annotate(text, (limits.copy_gbps, -0.9), xytext=(-4, 0), ha="right", va="center", size=9, **POINTS)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -1.4)
    axes.grid(alpha=0.25, which="both", axis="x")
    axes.grid(alpha=0.25, axis="y")
    axes.set(xlabel="bytes that must move, over time (GB/s)", title="Memory traffic against a copy (beyond it: caches)")


def _roof(axes: Any, rows: Sequence[tuple[str, Row]], limits: Ceilings) -> None:
    """FLOP/s over arithmetic intensity; the numbers at the points stand for the ops in the corner."""
    unit, per_s = ("TFLOP/s", 1e12) if max(limits.gemm_tflops.values()) >= 10 else ("GFLOP/s", 1e9)
    present = {row.dtype for _, row in rows}
    roofs = {dtype: 1e12 * rate / per_s for dtype, rate in limits.gemm_tflops.items() if dtype in present}
    slope = 1e9 * limits.copy_gbps / per_s
    points = [(r.extra["flops"] / r.extra["bytes"], 1e3 * r.extra["flops"] / (r.ms or 1) / per_s) for _, r in rows]
    xs = [x for x, _ in points] + [roof / slope for roof in roofs.values()]
    low, high = min(xs, default=1) / 4, max(xs, default=10) * 20
    for dtype, roof in roofs.items():
        colour = DTYPE_COLOURS[dtype]
        axes.plot([low, roof / slope, high], [low * slope, roof, roof], color=colour, lw=1.6)
        text = f"{dtype} GEMM, {short(roof)} {unit}"
        axes.annotate(text, (high, roof), xytext=(-2, 4), ha="right", size=9, **POINTS)
    names = list(dict.fromkeys(name for name, _ in rows))
    for (x, y), (name, row) in sorted(zip(points, rows, strict=True), key=lambda p: p[0]):
        _point(axes, row, x, y)
        number = names.index(name)
        axes.annotate(str(number + 1), (x, y), xytext=(-12 if number % 2 else 6, -3), size=8, **POINTS)
    key = "\n".join(f"{i}  {name}" for i, name in enumerate(names, 1))
    axes.text(0.98, 0.03, key, transform=axes.transAxes, ha="right", va="bottom", ma="left", size=9,
              bbox={"facecolor": "white", "edgecolor": "#cccccc", "alpha": 0.9})  # fmt: skip
    floor = min([y for _, y in points] + [low * slope])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor / 8, 2.5 * max(roofs.values(), default=1)),
             xlabel="arithmetic intensity (FLOP per byte)", ylabel=unit,
             title="Ops with matrix products under the roof")  # fmt: skip
    axes.grid(alpha=0.25)


def ratios(rows: Sequence[Row], limits: Ceilings | None = None) -> bytes | None:
    """Bars from 1 on a log axis: how many times as fast as torch.compile ditfast is, forward and backward apart.

    Black lines are its p20 to p80; grey diamonds the eager reference.
    """
    rows = [row for row in measured(rows, "ops") if row.ratio_to_compile and row.provider in (DITFAST, EAGER)]
    if not rows:
        return None
    labels, dtypes = labels_of(rows), list(dict.fromkeys(row.dtype for row in rows))
    names = list(dict.fromkeys(labels))
    with drawing() as pyplot:
        size = (2.6 + 3.6 * len(dtypes), 1.7 + 0.42 * len(names))
        figure, panels = pyplot.subplots(1, len(dtypes), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, dtype in zip(panels[0], dtypes, strict=True):
            for label, row in zip(labels, rows, strict=True):
                if row.dtype == dtype:
                    _ratio(axes, row, names.index(label))
            axes.axvline(1, color=INK, lw=1.2)
            axes.set_xscale("log", base=2)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(alpha=0.25, axis="x")
            axes.set(title=dtype, xlabel="speed over torch.compile (right of 1: faster)")
        values = [value for row in rows for value in _spread(row)]
        low, high = 0.85 * min([1, *values]), 1.6 * max([1, *values])
        ticks = [t for t in (COARSE if high > 12 * low else FINE) if low < t < high]
        panels[0, 0].set_xticks(ticks, [f"{t:.3g}" for t in ticks], minor=False)
        panels[0, 0].set_xticks([], minor=True)
        panels[0, 0].set_xlim(low, high)
        for kind, colour in PASS_COLOURS.items():
            panels[0, 0].barh(0, 0, left=1, color=colour, label=f"ditfast {PASSES[kind]}")
        panels[0, 0].plot([], [], "D", color=GREY, ms=5, label="eager reference")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return png(figure)


def _spread(row: Row) -> tuple[float, float]:
    """The ratio to torch.compile by a row's own p80 and p20."""
    ratio, ms = row.ratio_to_compile or 1.0, row.ms or 1.0
    return ratio * ms / (row.ms_p80 or ms), ratio * ms / (row.ms_p20 or ms)


def _ratio(axes: Any, row: Row, y: float) -> None:
    ratio, kind = row.ratio_to_compile or 1.0, row.extra["pass"]
    y += {"fwd": -0.2, "bwd": 0.2}[kind]
    if row.provider == EAGER:
        axes.plot(ratio, y, "D", color=GREY, ms=5, mec="white", zorder=3)
        return
    axes.barh(y, ratio - 1, left=1, height=0.38, color=PASS_COLOURS[kind])
    axes.plot(_spread(row), [y, y], color=INK, lw=1)
    axes.annotate(f"{ratio:.2f}", (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 0), va="center", ha="right",
                  size=8, **POINTS)  # fmt: skip


def steps(rows: Sequence[Row], limits: Ceilings | None = None) -> bytes | None:
    """Bars: every provider's training step and sampling, as speed over torch.compile's of the same job."""
    rows = [row for row in measured(rows, "model", "sample") if row.ratio_to_compile]
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        jobs.setdefault(f"{row.name}, {row.dtype}\n{row.shape}", []).append(row)
    if not jobs:
        return None
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(WIDTH, 1.2 + 0.26 * len(rows) + 0.16 * len(jobs)))
        ticks, y, seen = [], 0.0, set[str]()
        for mine in jobs.values():
            ticks.append(y + (len(mine) - 1) / 2)
            for row in mine:
                ratio, (low, high) = row.ratio_to_compile or 1.0, _spread(row)
                colour = PROVIDER_COLOURS.get(row.provider, SKY)
                label = None if row.provider in seen else row.provider
                axes.barh(y, ratio, height=0.86, color=colour, label=label)
                seen.add(row.provider)
                axes.plot([low, high], [y, y], color=INK, lw=1)
                axes.annotate(f"{ratio:.2f}", (high, y), xytext=(4, 0), va="center", size=8, **POINTS)
                y += 1
            y += 0.7
        axes.axvline(1, color=INK, lw=1.2)
        axes.set_yticks(ticks, list(jobs))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(axes.get_xlim()[1], 1))
        axes.grid(alpha=0.25, axis="x")
        axes.set(xlabel="speed over torch.compile of the reference (black lines: p20 to p80)", title="Whole steps")
        figure.legend(loc="outside lower center", ncols=5)
        return png(figure)


def memory(rows: Sequence[Row], limits: Ceilings | None = None) -> bytes | None:
    """Paired bars, a panel a model: activation bytes per token and layer by policy, measured and estimated."""
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        if row.suite == "memory" and row.provider == DITFAST and row.extra.get("bytes_per_token_layer"):
            jobs.setdefault(f"{row.name.partition(' recompute=')[0]}, {row.dtype}", []).append(row)
    if not jobs:
        return None
    kinds = (("bytes_per_token_layer", "measured", BLUE, -0.2), ("estimate_per_token_layer", "estimate", GREY, 0.2))
    longest, across = max(len(mine) for mine in jobs.values()), min(3, len(jobs))
    down = -(-len(jobs) // across)
    with drawing() as pyplot:
        size = (1.2 + 3.4 * across, 0.7 + (1 + 0.5 * longest) * down)
        figure, panels = pyplot.subplots(down, across, figsize=size, squeeze=False)
        for axes in panels.flat[len(jobs) :]:
            axes.remove()
        for axes, (name, mine) in zip(panels.flat, jobs.items(), strict=False):
            for key, label, colour, shift in kinds:
                values = [row.extra.get(key) or 0 for row in mine]
                bars = axes.barh([y + shift for y in range(len(mine))], values, 0.38, color=colour, label=label)
                axes.bar_label(bars, [f"{v:,.0f}" for v in values], padding=3, size=8)
            axes.set_yticks(range(len(mine)), [row.extra["policy"] for row in mine])
            axes.invert_yaxis()
            axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
            axes.xaxis.set_major_locator(pyplot.MaxNLocator(4))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set(xlabel="bytes per token and layer", title=name)
        figure.suptitle("Activations kept")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return png(figure)


def scaling(rows: Sequence[Row], limits: Ceilings | None = None) -> bytes | None:
    """Images per second over the number of ranks, each point's efficiency, and a dashed line of what 1 would be.

    That of a rank alone with its own share of the machine: on a CPU the ranks have fewer threads the more they are.
    """
    jobs: dict[str, list[Row]] = {}
    for row in sorted(measured(rows, "scale"), key=lambda row: row.extra["ranks"]):
        jobs.setdefault(f"{row.name.partition(' ranks ')[0]}, {row.dtype}", []).append(row)
    jobs = {name: mine for name, mine in jobs.items() if len(mine) > 1}
    if not jobs:
        return None
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(0.75 * WIDTH, 4.2))
        for (name, mine), colour in zip(jobs.items(), (BLUE, VERMILION, GREY, SKY) * len(jobs), strict=False):
            ranks = [row.extra["ranks"] for row in mine]
            rates = [row.extra["images_per_s"] for row in mine]
            axes.plot(ranks, rates, "o-", color=colour, ms=8, label=name)
            alone = [rate / (row.extra["efficiency"] or 1) for row, rate in zip(mine, rates, strict=True)]
            axes.plot(ranks, alone, "--", color=colour, lw=1, alpha=0.6)
            for row, x, y in list(zip(mine, ranks, rates, strict=True))[1:]:
                share = row.extra.get("communication_share")
                text = f"efficiency {row.extra['efficiency']:.0%}"
                text += "" if share is None else f",\n{share:.0%} communication"
                axes.annotate(text, (x, y), xytext=(8, -4), size=9, va="top", **POINTS)
        axes.set_xticks(sorted({row.extra["ranks"] for mine in jobs.values() for row in mine}))
        axes.set_ylim(bottom=0)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.35 * (high - low))
        axes.grid(alpha=0.25)
        axes.set(xlabel="ranks", ylabel="images per second", title="Scaling (dashed: at an efficiency of 1)")
        axes.legend(loc="lower left")
        return png(figure)


FIGURES: dict[str, Callable[[Sequence[Row], Ceilings | None], bytes | None]] = {
    "breakdown": breakdown, "roofline": roofline, "ratios": ratios, "steps": steps, "memory": memory,
    "scaling": scaling,
}  # fmt: skip
