"""Suites and tools by name: `python -m bench SUITE`, and what COMMANDS lists, each with a --help of its own."""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

from bench import limits
from bench.contest import Settings
from bench.machine import machine
from bench.rows import resume
from bench.runner import NoSuchJob, failures, run, table
from bench.stopping import terminated_as_interrupted
from bench.suites import SUITES, Options, scale_of

# Sub-command -> the module whose main(arguments) does it and returns the exit status.
COMMANDS: dict[str, str] = {
    "limits": "bench.limits",
    "compare": "bench.compare",
    "report": "bench.report.page",
}
INTERRUPTED = 130  # the shell's status of what ended by SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite or a tool; a suite's status is 1 where ditfast failed parity or raised, 2 for what it was given, 5,
    as pytest's, where no job is of the name asked for, and 0 without a GPU. After Ctrl-C or SIGTERM it is 130,
    and the rows measured until then are kept.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminated_as_interrupted():
            return _main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    options = parser().parse_args(argv)
    try:
        return suite(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 5 if isinstance(error, NoSuchJob) else 2


def suite(options: argparse.Namespace) -> int:
    """Measures a suite, prints its table, also of a part after Ctrl-C; the exit status."""
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale, here = scale_of(device, options.small), machine(device)
    results = resume(options.json, here)
    module = importlib.import_module(SUITES[options.suite])
    found = limits.of(device)
    results.limits = limits.as_dict(found)
    settings = Settings(device, found, scale.rounds, scale.seconds, here["cache_bytes"])
    left: int | None = None
    with suppress(KeyboardInterrupt):  # what was measured until then is told, as after any other end
        left = run(
            module.contests(Options(device, scale)),
            results,
            settings,
            seconds=options.seconds,
            only=options.only,
            retry=options.retry,
            path=options.json,
        )
    rows = [row for row in results.rows if row.suite == options.suite]
    print(getattr(module, "table", table)(rows))
    print(f"on {here['device']}, {here['threads']} threads, torch {here['torch']}, commit {here['commit']}")
    goes_on = "; the same command goes on" if options.json else ""
    if left is None:
        print(f"interrupted after {len(rows)} rows{goes_on}")
        return INTERRUPTED
    if left:
        print(f"out of time: {left} jobs are left{goes_on}")
    return int(bool(failures(rows)))


def parser() -> argparse.ArgumentParser:
    """The options of a suite."""
    tools = "; ".join(f"{name} ({module})" for name, module in COMMANDS.items())
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__, epilog=f"tools: {tools}")
    made.add_argument("suite", choices=SUITES, help="what to measure")
    made.add_argument("--small", action="store_true", help="the smallest sizes: whether all runs, not how fast")
    made.add_argument(
        "--only", type=_regex, default="", metavar="REGEX", help="jobs whose 'suite name dtype shape' contains this"
    )
    made.add_argument("--seconds", type=_seconds, default=float("inf"), help="begin no job that would end later")
    made.add_argument(
        "--json", metavar="FILE", help="where rows are kept; of its jobs only those that raised are repeated"
    )
    made.add_argument("--retry", action="store_true", help="with --json: jobs again whose rows say absent or refused")
    made.add_argument("--device", type=_device, help="cuda, cuda:1, cpu; a GPU where there is one")
    return made


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r} ({error})") from error
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds from 0, got {text!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"PyTorch sees {torch.cuda.device_count()} GPUs here, got {text!r}")
    return device


if __name__ == "__main__":
    sys.exit(main())
