"""`python -m ditfast.kernels check | traffic | table`: what can be known of the kernels without a GPU.

check compiles every kernel for GPUs that need not be there; traffic counts the bytes that they move, in Triton's
interpreter (TRITON_INTERPRET=1); table prints the op table of the README.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import OPS, check, traffic
from .readme import op_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 1 if a kernel is outside the limits, 2 if it cannot be checked here."""
    parser = argparse.ArgumentParser(
        prog="python -m ditfast.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compiled = commands.add_parser("check", help="registers, spills, shared memory, wide loads, tensor cores")
    compiled.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=check.SHARED_LIMITS)
    counted = commands.add_parser("traffic", help="bytes requested and unique bytes over the minimum")
    for command in (compiled, counted):
        command.add_argument("--json", type=Path, metavar="FILE", help="write one object per row here as well")
    commands.add_parser("table", help="the op table of the README")
    options = parser.parse_args(argv)
    if options.command == "table":
        print(op_table(OPS))
        return 0
    tool: Any = {"check": check, "traffic": traffic}[options.command]
    try:
        rows: list[Any] = list(check.check(OPS, options.arch) if tool is check else traffic.traffic(OPS))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(tool.table(rows))
    if options.json:
        options.json.write_text(json.dumps(tool.as_json(rows), indent=1) + "\n")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
