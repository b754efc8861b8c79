"""Tables and sentences for a terminal, without boxes, so that they also read well in a file or a mail."""

import shutil
import textwrap
from collections.abc import Collection, Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Lines of cells, to the left in some columns; each row's last cell has no column, so that it may be a sentence."""
    columns = zip_longest(*(row[:-1] for row in rows), fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for *cells, last in rows:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=False)))
        lines.append(" ".join([*padded, last]).rstrip())
    return "\n".join(lines)


def wrapped(text: str, indent: int = 0) -> str:
    """Lines no longer than the terminal is wide, 80 where there is none; no word is cut."""
    width, first = shutil.get_terminal_size().columns, " " * indent
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=2 * first, break_long_words=False, break_on_hyphens=False
    )
