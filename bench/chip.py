"""The ledger of what passed on a real GPU: `python -m bench.chip stale`, and `test`, which gpu.sh runs.

bench/results/chip.json maps each op with Triton kernels to the hash of its source when its tests last passed on a chip,
with the commit and the machine. An op whose source has another hash since is stale: it has not run there as it is now.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, machine_line
from ditfast.doctor import LEDGER
from ditfast.kernels import OPS, OpSpec
from ditfast.kernels._source import source_hash
from ditfast.kernels.attention.libraries import LIBRARIES, version_of

KERNEL_OPS = tuple(spec for spec in OPS if "triton" in spec.op.backends)
# What other people's kernels are entered as, with the version that ran; the doctor looks there.
ADAPTERS = {f"{spec.name}/{name}": name for spec in OPS for name in spec.op.functions if name in LIBRARIES}

Ledger = dict[str, dict[str, Any]]


def read(path: Path = LEDGER) -> Ledger:
    """The ledger; empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def stale(ledger: Ledger, specs: Sequence[OpSpec] = KERNEL_OPS) -> list[str]:
    """Names of the ops that have not passed on a chip as they are now."""
    return [spec.name for spec in specs if ledger.get(spec.name, {}).get("hash") != source_hash(spec.source)]


def record(passed: Sequence[str], machine: dict[str, Any], path: Path = LEDGER) -> None:
    """Enter the ops and adapters that passed; the entries of others stay."""
    ledger = read(path) | {
        spec.name: {"hash": source_hash(spec.source), **machine} for spec in KERNEL_OPS if spec.name in passed
    }
    ledger |= {name: {"version": version_of(ADAPTERS[name]), **machine} for name in passed if name in ADAPTERS}
    _write(ledger, path)


def forget(name: str, path: Path = LEDGER) -> None:
    """Take the entry of an op that failed out, where it has one."""
    ledger = read(path)
    if ledger.pop(name, None):
        _write(ledger, path)


def _write(ledger: Ledger, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(ledger.items())), indent=1) + "\n")


class Tally:
    """pytest plugin: enters an op in the ledger once all its tests are done, takes it out once one failed, in time.

    The tests of an op by another library are that adapter's.

    Entered are ops whose tests did not fail, at least one of which ran, and only if the general ones, which name no op
    and so run first, did not fail either. Without `enters` no op is.
    """

    def __init__(self, deadline: float, machine: dict[str, Any], path: Path = LEDGER, enters: bool = True):
        self.deadline, self.machine, self.path, self.enters = deadline, machine, path, enters
        self.left: dict[str | None, set[str]] = defaultdict(set)
        self.failed: set[str | None] = set()
        self.ran: set[str | None] = set()
        self.passed: list[str] = []
        self.ops: dict[str, str | None] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        """Group what is left after deselection by op: general tests, then stale ops, other kernels, other ops."""
        first = stale(read(self.path))
        names = [None, *dict.fromkeys((*first, *(s.name for s in KERNEL_OPS), *(s.name for s in OPS), *ADAPTERS))]
        for item in session.items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            name = getattr(params.get("spec"), "name", params.get("name"))
            name = f"{name}/{params['backend']}" if params.get("backend") in LIBRARIES else name
            self.ops[item.nodeid] = name if name in names else None
            self.left[self.ops[item.nodeid]].add(item.nodeid)
        session.items.sort(key=lambda item: names.index(self.ops[item.nodeid]))

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Stop in time."""
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "out of time: the ops that were not finished are not recorded"

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test as done when torn down, and as failed if any phase of it failed."""
        op = self.ops[report.nodeid]
        if report.failed:
            self.failed.add(op)
            if op is not None:
                forget(op, self.path)
        elif report.when == "call" and report.passed:
            self.ran.add(op)
        if report.when == "teardown":
            self.left[op].discard(report.nodeid)
            if op is not None and not self.left[op]:
                self._finish(op)

    def _finish(self, op: str) -> None:
        general_passed = None not in self.failed and not self.left[None]
        if self.enters and general_passed and op in self.ran - self.failed:
            self.passed.append(op)
            record([op], self.machine, self.path)


def run_tests(
    seconds: float, arguments: Sequence[str] = (), path: Path = LEDGER, tests: Path = ROOT / "tests" / "kernels"
) -> int:
    """Run the sanitizer and the kernel tests on this machine's GPU and keep the ledger; pytest's exit status, or 1.

    With pytest arguments nothing is entered, as they may have left tests of an op out, and the sanitizer is left out.
    """
    import pytest

    from bench.sanitize import sanitize

    deadline, whole = time.monotonic() + seconds, not arguments and not os.environ.get("PYTEST_ADDOPTS")
    unsafe = sanitize(seconds / 3) if whole else set()
    for name in unsafe:
        forget(name, path)
    tally = Tally(deadline, machine_line(), path, enters=whole)
    tally.failed |= unsafe
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(tests), *arguments], plugins=[tally])
    entered = ", ".join(tally.passed) or "none" if whole else "none, since pytest had arguments"
    print(f"entered as passed on {torch.cuda.get_device_name()}: {entered}")
    return int(status) or int(bool(unsafe))


def main(argv: Sequence[str] | None = None) -> int:
    """`stale` prints the stale ops, one a line; `test` runs the kernel tests on a GPU, or says that there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.chip", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stale", help="ops that have not passed on a chip as they are now")
    test = commands.add_parser("test", help="run the kernel tests on a GPU and update the ledger")
    test.add_argument("--seconds", type=float, default=480.0, help="stop after this long")
    options, arguments = parser.parse_known_args(argv)
    if options.command == "stale":
        names = stale(read())
        print(
            "\n".join(f"not run on a chip as it is now: {name}" for name in names) or "all kernels have run on a chip"
        )
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: nothing ran, the ledger is as it was")
        return 0
    return run_tests(options.seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
