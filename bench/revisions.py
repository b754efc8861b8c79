"""Measures a commit and the working tree in turns, each in processes of its own, by the same bench code."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.compare import pooled
from bench.rows import Results
from bench.stopping import terminated_as_interrupted

ROOT = Path(__file__).parents[1]


def measure_in_turns(
    rev: str, suite: Sequence[str], *, rounds: int = 3, seconds: float = 120, root: Path = ROOT
) -> tuple[Results, Results]:
    """Results of `python -m bench SUITE ...` for the commit `rev` and for the tree at `root`, each over all rounds.

    Old and new take turns, and every other round begins with the new one, so that a machine that slowly gets warmer or
    busier favours neither. `seconds` bounds each run of the suite. ValueError for a commit that is not there, and where
    a run leaves no results.
    """
    if not suite:
        raise ValueError("--base needs a suite to measure, for instance: compare --base HEAD~1 ops")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    with (
        terminated_as_interrupted(),
        tempfile.TemporaryDirectory(prefix="ditfast-bench-") as folder,
        worktree(rev, Path(folder) / "base", root) as (base, commit),
    ):
        found: dict[Path, list[Results]] = {base: [], root: []}
        for i in range(rounds):
            for tree in (base, root) if i % 2 == 0 else (root, base):
                print(f"round {i + 1} of {rounds}: {rev if tree == base else 'the working tree'}", flush=True)
                found[tree].append(_run(tree, suite, Path(folder) / f"{tree == base}-{i}.json", seconds))
    old, new = pooled(found[base]), pooled(found[root])
    return replace(old, machine=old.machine | {"commit": commit}), new


def _run(tree: Path, suite: Sequence[str], file: Path, seconds: float) -> Results:
    command = [sys.executable, "-m", "bench", *suite, "--seconds", str(seconds), "--json", str(file)]
    # A refused parity check ends with 1 and leaves results; a suite that cannot run leaves none.
    done = subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not file.exists():
        reason = done.stderr.strip()[-2000:] if done.returncode else "no job is of that name, or fits into --seconds"
        raise ValueError(f"{' '.join(command[1:])} measured nothing in {tree}: {reason}")
    return Results.load(file)


@contextmanager
def worktree(rev: str, path: Path, root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """A checkout of `rev` at `path` with bench/ as it is at `root`, and its commit; gone after the block."""
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    if found.returncode:
        raise ValueError(f"{root} has no commit {rev!r}")
    commit = found.stdout.strip()
    added = _git(root, "worktree", "add", "--quiet", "--detach", str(path), commit)
    try:
        if added.returncode:
            raise ValueError(f"git worktree add of {rev} failed: {added.stderr.strip()}")
        shutil.rmtree(path / "bench", ignore_errors=True)
        shutil.copytree(root / "bench", path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
        yield path, commit
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _git(root, "worktree", "prune")


def _git(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
