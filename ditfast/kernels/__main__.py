"""`python -m ditfast.kernels check`: compile the kernels for GPUs that need not be there."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import OPS
from .check import SHARED_LIMITS, as_json, check, table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 1 if a kernel spills or needs too much shared memory, 2 if it cannot be checked here."""
    parser = argparse.ArgumentParser(prog="python -m ditfast.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compile_check = commands.add_parser("check", help="registers, spills and shared memory at the shapes of DiT-XL/2")
    compile_check.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=SHARED_LIMITS)
    compile_check.add_argument("--json", type=Path, metavar="FILE", help="write one object per kernel here as well")
    options = parser.parse_args(argv)
    try:
        rows = list(check(OPS, options.arch))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
