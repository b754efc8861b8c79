"""A report of result files: one HTML page with everything in it, the pictures as PNG, and PERFORMANCE.md's tables.

python -m bench report [FILES...] --out DIR     the page and the pictures, by default of bench/results
python -m bench report --fill PERFORMANCE.md    the tables of a Markdown page, and its pictures
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.machine import ROOT
from bench.report.figures import FIGURES
from bench.report.tables import PICTURES, TABLES, Section, committed, fill, load, picture
from bench.report.targets import DEVICE, targets
from ditfast.files import replacing

TITLES = {
    "machine": "Machine", "steps": "Training steps", "where": "Where a training step's time goes",
    "gains": "Next gains", "ops": "Ops", "sampling": "Sampling", "memory": "Activation memory by recompute policy",
    "scaling": "Scaling", "feed": "Training from files", "fast-dit": "fast-DiT's table", "mindone": "MindONE's tables",
}  # fmt: skip
# The pictures that stand over a table.
ABOVE = {"where": "breakdown", "ops": "ratios", "memory": "memory", "scaling": "scaling", "steps": "steps"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } img { max-width: 100%; background: white; border-radius: 4px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
tr:hover { background: var(--soft); } .number { text-align: right; }
"""


def pictures(section: Section) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every figure that a device's rows allow."""
    for name, draw in FIGURES.items():
        if (image := draw(section.rows, section.limits)) is not None:
            yield name, image


def page(found: Sequence[Section], drawn: dict[str, dict[str, bytes]]) -> str:
    """The page; `drawn` has the pictures by device and name. The results stand in it as JSON, under id "results"."""
    body = ["<h1>ditfast, measured</h1>"]
    for section in found:
        images = dict(drawn[section.device])
        body.append(f"<h2>{html.escape(section.device)}</h2>")
        for name, (suite, make) in TABLES.items():
            if suite and not section.of(suite):
                continue
            body.append(f"<h3>{TITLES[name]}</h3>")
            for image in (ABOVE.get(name), "roofline" if name == "ops" else None):
                if image in images:
                    body.append(_image(image, images[image]))
            body.append(_blocks(make(section)))
    mine = [row for section in found if DEVICE in section.device for row in section.rows]
    body += ["<h2>Goals</h2>", _blocks(targets(mine))]
    twin = json.dumps([
        {"machines": s.machines, "limits": asdict(s.limits) if s.limits else None, "rows": [asdict(r) for r in s.rows]}
        for s in found
    ])  # fmt: skip
    # "</script>" in a name would end the element.
    twin = twin.replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>ditfast, measured</title>'
        f"<style>{STYLE}</style></head>\n<body>{chr(10).join(body)}\n"
        f'<script type="application/json" id="results">{twin}</script></body></html>\n'
    )


def _image(name: str, data: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<p><img alt="{html.escape(PICTURES[name])}" src="{source}"></p>'


def _blocks(markdown: str) -> str:
    """Markdown of tables, lists and plain lines as HTML; nothing else is made here."""
    made = []
    for block in markdown.split("\n\n"):
        lines = block.splitlines()
        if block.startswith("|"):
            right = [cell.strip().endswith(":") for cell in lines[1].strip("|").split("|")]
            rows = [_row(line, right, "td" if i else "th") for i, line in enumerate([lines[0], *lines[2:]])]
            made.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
        elif block.startswith("- "):
            items = (f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lines)
            made.append(f"<ul>{''.join(items)}</ul>")
        else:
            made.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(made)


def _row(line: str, right: Sequence[bool], tag: str) -> str:
    cells = zip(line.strip("|").split("|"), right, strict=True)
    made = (f"<{tag}{' class=number' * flush}>{html.escape(cell.strip())}</{tag}>" for cell, flush in cells)
    return f"<tr>{''.join(made)}</tr>"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes what is asked for; 2 for files that are no results."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="result files; bench/results/*.json without")
    parser.add_argument("--out", type=Path, help="directory of report.html and the pictures")
    parser.add_argument("--fill", type=Path, metavar="PAGE.md", help="a Markdown page whose tables are written anew")
    options = parser.parse_args(argv)
    if options.out is None and options.fill is None:
        parser.error("say what to write: --out DIR, --fill PAGE.md, or both")
    try:
        found = load(options.files or committed())
        text = fill(options.fill.read_text(), found) if options.fill else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawn = {section.device: dict(pictures(section)) for section in found}
    written = dict[Path, bytes]()
    if text is not None:
        written[options.fill] = text.encode()
        written |= {ROOT / picture(s, n): image for s in found for n, image in drawn[s.device].items()}
    if options.out is not None:
        written[options.out / "report.html"] = page(found, drawn).encode()
        written |= {options.out / picture(s, n).name: image for s in found for n, image in drawn[s.device].items()}
    for path, data in written.items():
        with replacing(path) as file:
            file.write(data)
    print(f"wrote {', '.join(map(str, written))}")
    return 0
