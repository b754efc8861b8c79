"""`python -m ditfast.kernels check | traffic | tune | table`: tools for whoever writes kernels or chooses them.

check    compiles every kernel for GPUs that need not be there: registers, spills, shared memory, tensor cores
traffic  counts the bytes that every kernel moves, in Triton's interpreter (TRITON_INTERPRET=1 in the environment)
tune     measures configs around the pinned ones on this GPU and writes the fastest to a file for `use_tuned`
table    prints the op table of the README
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import OPS, OpSpec, autotune, check, traffic
from .readme import op_table
from .tf32 import tf32_products
from .tune import tune

DTYPES = ("bfloat16", "float16", "float32")
WITH_KERNELS = [spec.name for spec in OPS if "triton" in spec.op.backends]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 1 if a kernel is outside the limits, 2 if it cannot be done here."""
    options = _parser().parse_args(argv)
    if options.command == "table":
        print(op_table(OPS))
        return 0
    specs = [spec for spec in OPS if not options.op or spec.name in options.op]
    try:
        if options.command == "tune":
            options.cache.parent.mkdir(parents=True, exist_ok=True)
            _probe(options.cache)
        elif options.json:
            _probe(options.json)
        if options.command == "tune":
            return _tune(specs, options)
        tool: Any = {"check": check, "traffic": traffic}[options.command]
        rows: list[Any] = list(_check(specs, options) if tool is check else traffic.traffic(specs))
        print(tool.table(rows))
        if options.json:
            options.json.write_text(json.dumps(tool.as_json(rows), indent=1) + "\n")
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(row.ok for row in rows) else 1


def _check(specs: Sequence[OpSpec], options: argparse.Namespace) -> list[check.Row]:
    dtype, products = _precision(options.dtype)
    with products:
        return list(check.check(specs, options.arch, dtype))


def _precision(name: str) -> tuple[torch.dtype, AbstractContextManager[None]]:
    """The dtype of the inputs, and a context in which the products are as asked."""
    return (torch.float32, tf32_products()) if name == "tf32" else (getattr(torch, name), nullcontext())


def _probe(path: Path) -> None:
    """OSError where this file cannot be written: before minutes of work, not after."""
    there = path.exists()
    path.open("a").close()
    if not there:
        path.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ditfast.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compiled = commands.add_parser("check", help="registers, spills, shared memory, wide loads, tensor cores")
    compiled.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=check.SHARED_LIMITS)
    compiled.add_argument("--dtype", choices=(*DTYPES, "tf32"), default="bfloat16", help="of the inputs: %(default)s")
    counted = commands.add_parser("traffic", help="bytes requested and unique bytes over the minimum")
    for command in (compiled, counted):
        command.add_argument("--json", type=Path, metavar="FILE", help="write one object per row here as well")
    tuned = commands.add_parser("tune", help="measure configs on this GPU; what is in the file already is left")
    tuned.add_argument("--sizes", nargs="+", type=_size, default=[], metavar="B=64", help="in place of the benches'")
    tuned.add_argument("--dtype", choices=(*DTYPES, "tf32"), default="bfloat16", help="of the inputs: %(default)s")
    tuned.add_argument("--cache", type=Path, default=autotune.CACHE, metavar="FILE", help="%(default)s")
    tuned.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this long")
    for command in (compiled, counted, tuned):
        command.add_argument("--op", nargs="+", choices=WITH_KERNELS, metavar="NAME", help="all by default")
    commands.add_parser("table", help="the op table of the README")
    return parser


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name.isalpha() or not size.isdecimal() or not int(size):
        raise argparse.ArgumentTypeError(f"expected a dim and its size such as B=64, got {text!r}")
    return name, int(size)


def _tune(specs: Sequence[OpSpec], options: argparse.Namespace) -> int:
    """Print and save each choice as soon as it is made, so that the next run goes on from there."""
    started, known = time.monotonic(), autotune.known(options.cache)
    dtype, products = _precision(options.dtype)
    with products:
        for choice in tune(specs, dtype, dict(options.sizes), known):
            print(choice, flush=True)
            autotune.write(options.cache, [choice])
            if time.monotonic() - started > options.seconds:
                print("out of time: the same command goes on from here")
                return 0
    print(f"{options.cache} holds every choice asked for; use_tuned({str(options.cache)!r}) uses them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
