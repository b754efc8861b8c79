"""Markdown tables, aligned so that a terminal shows them well too."""

from collections.abc import Sequence

NOT_MEASURED = "not measured"


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are flush left, the others right."""
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"a line has {len(line)} cells, expected {len(head)}: {list(line)}")
    widths = [max(3, *(len(line[i]) for line in (head, *lines))) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def text(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(text, (head, rule, *lines)))


def number(value: float | None, digits: int = 3) -> str:
    """So many digits, without an exponent; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "-" if value is None else f"{value:.0%}"


def megabytes(value: float | None) -> str:
    """Bytes in MB (1e6)."""
    return number(None if value is None else value / 1e6)
