"""Two files of results against each other, and a commit against the working tree."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import compare, revisions
from bench.rows import Results, Row

MACHINE = {"device": "a CPU", "commit": "abc", "torch": "2.13"}


def row(ms: float | None = 10.0, spread: float = 0.02, **changes) -> Row:
    fields = {"suite": "ops", "name": "an_op fwd", "provider": "ditfast", "dtype": "bf16", "shape": "B=2"} | changes
    times = {} if ms is None else {"ms": ms, "ms_p20": ms * (1 - spread), "ms_p80": ms * (1 + spread)}
    return Row(**(fields | times))


def verdict(old: Row, new: Row) -> str:
    [change] = compare.match(Results({}, None, [old]), Results({}, None, [new])).changes
    return change.verdict


@pytest.fixture
def files(tmp_path):
    """Saves two results and returns the command's arguments for them."""

    def saved(old: list[Row], new: list[Row], **machine) -> list[str]:
        Results(MACHINE, None, old).save(tmp_path / "a.json")
        Results(MACHINE | machine, None, new).save(tmp_path / "b.json")
        return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]

    return saved


def test_only_what_lies_apart_is_slower_or_faster():
    assert verdict(row(10), row(11)) == "slower"
    assert verdict(row(11), row(10)) == "faster"
    assert verdict(row(10, spread=0.1), row(11, spread=0.1)) == "same"


def test_a_regression_beyond_the_bound_fails_and_one_within_does_not(files, capsys):
    arguments = files([row(10)], [row(11)])
    assert compare.main([*arguments, "--fail-above", "5%"]) == 1
    assert "! ops" in capsys.readouterr().out
    assert compare.main([*arguments, "--fail-above", "0.2"]) == 0
    assert compare.main(arguments) == 0


def test_scatter_is_no_regression(files):
    assert compare.main([*files([row(10, spread=0.3)], [row(12, spread=0.3)]), "--fail-above", "5%"]) == 0


def test_more_memory_is_a_regression(files):
    old, new = row(10, peak_bytes=1000), row(10, peak_bytes=1100)
    assert compare.main([*files([old], [new]), "--fail-above", "5%"]) == 1
    assert compare.main([*files([new], [old]), "--fail-above", "5%"]) == 0


def test_an_op_refused_now_is_a_regression(files, capsys):
    refused = row(None, extra={"refused": "dx differs"})
    assert compare.main([*files([row()], [refused]), "--fail-above", "5%"]) == 1
    assert "refused" in capsys.readouterr().out
    assert compare.main([*files([refused], [refused]), "--fail-above", "5%"]) == 0


def test_an_op_that_fails_now_is_a_regression(files, capsys):
    failed = row(None, extra={"failed": "OutOfMemoryError: "})
    assert compare.main([*files([row()], [failed]), "--fail-above", "5%"]) == 1
    assert re.search(r"^! ops .* failed$", capsys.readouterr().out, re.M)
    assert compare.main([*files([failed], [failed]), "--fail-above", "5%"]) == 0
    without_time = row(None, peak_bytes=1000)
    assert compare.main([*files([without_time], [failed]), "--fail-above", "5%"]) == 1, "of rows without a time too"


def test_a_row_that_is_not_there_any_more_is_a_regression(files, capsys):
    arguments = [*files([row(), row(name="lost fwd")], [row()]), "--fail-above", "5%"]
    assert compare.main(arguments) == 1
    assert "! only in the old file: ops lost fwd" in capsys.readouterr().out
    other = [row(name="lost fwd", provider="eager"), row(None, name="absent fwd", extra={"absent": "no GPU"})]
    assert compare.main([*files([row(), *other], [row()]), "--fail-above", "5%"]) == 0


def test_only_rows_of_ditfast_are_judged(files):
    eager = [row(ms, provider="eager", peak_bytes=int(100 * ms)) for ms in (10, 20)]
    assert compare.main([*files([eager[0]], [eager[1]]), "--fail-above", "5%"]) == 0
    graph = [row(ms, provider="ditfast graph") for ms in (10, 20)]
    assert compare.main([*files([graph[0]], [graph[1]]), "--fail-above", "5%"]) == 1


def test_rows_of_one_file_are_named(files, capsys):
    arguments = files([row(), row(name="old_op fwd")], [row(), row(name="new_op fwd")])
    assert compare.main(arguments) == 0
    output = capsys.readouterr().out
    assert "only in the old file: ops old_op fwd" in output and "only in the new file: ops new_op fwd" in output


def test_files_without_a_row_in_common_are_refused(files, capsys):
    assert compare.main(files([row(name="old_op fwd")], [row()])) == 2
    assert "no row in common" in capsys.readouterr().out


def test_results_of_different_devices_are_refused_unless_forced(files, capsys):
    arguments = files([row()], [row()], device="another CPU")
    assert compare.main(arguments) == 2
    assert "a CPU and another CPU" in capsys.readouterr().out
    assert compare.main([*arguments, "--force"]) == 0


def test_other_differences_of_the_machines_are_told(files, capsys):
    assert compare.main(files([row()], [row()], torch="2.14", commit="def")) == 0
    output = capsys.readouterr().out
    assert "torch: 2.13 and 2.14" in output and "commit" not in output


@pytest.mark.parametrize("arguments", [[], ["a.json"], ["a.json", "b.json", "c.json"], ["missing.json", "gone.json"]])
def test_what_is_no_pair_of_files_is_refused(arguments, capsys):
    assert compare.main(arguments) == 2
    assert capsys.readouterr().out.startswith("error: ")


@pytest.mark.parametrize("suite", [["nosuite"], ["ops", "--only", "("], ["ops", "--nonsense"]])
def test_a_suite_that_cannot_run_is_refused_before_a_worktree_is_made(suite, monkeypatch, capsys):
    monkeypatch.setattr(revisions, "worktree", lambda *_: pytest.fail("a worktree was made"))
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--base", "HEAD", *suite])
    assert "python -m bench: error: " in capsys.readouterr().err


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0%", 0.0)])
def test_a_share_is_read(text, share):
    assert compare.percent(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["five", "-1%", "nan", "", "5"])
def test_no_share_is_refused(text):
    with pytest.raises(compare.argparse.ArgumentTypeError, match="5%"):
        compare.percent(text)


def test_rounds_are_pooled_over_their_scatter():
    rounds = [Results(MACHINE, None, [row(ms, peak_bytes=int(ms))]) for ms in (10, 12, 20)]
    [pooled] = compare.pooled(rounds).rows
    assert pooled.ms == 12 and pooled.ms_p20 < 10.5 and pooled.ms_p80 > 19 and pooled.peak_bytes == 20


def test_a_row_refused_in_one_round_is_refused():
    rounds = [Results(MACHINE, None, [row()]), Results(MACHINE, None, [row(None, extra={"refused": "dx"})])]
    [pooled] = compare.pooled(rounds).rows
    assert pooled.ms is None and pooled.extra["refused"] == "dx"


# A bench whose one row has the milliseconds that are written in the ditfast beside it; it notes who was asked.
SUITE = """
import json, os, sys, time
from pathlib import Path

ms = float(Path("ditfast/speed.txt").read_text())
open(os.environ["LOG"], "a").write(f"{ms:.0f} ")
time.sleep(float(os.environ.get("SLEEP", 0)))
if sys.argv[1] != "ops":
    sys.exit("no suite " + sys.argv[1])
row = {"suite": "ops", "name": "an_op", "provider": "ditfast", "dtype": "fp32", "shape": ""}
row |= {"ms": ms, "ms_p20": ms, "ms_p80": ms, "extra": {}}
row |= dict.fromkeys(("ratio_to_compile", "percent_of_limit", "peak_bytes"))
results = {"machine": {"device": "x", "commit": None}, "limits": None, "rows": [row]}
Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(results))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose `ditfast` takes 10 ms in its commit and 20 in its working tree, with a bench that says so."""
    root = tmp_path / "repository"
    (root / "ditfast").mkdir(parents=True)
    (root / "ditfast" / "speed.txt").write_text("10\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "bench").mkdir()  # only in the working tree: both commits are measured by this bench
    (root / "bench" / "__main__.py").write_text(SUITE)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (root / "ditfast" / "speed.txt").write_text("20\n")
    return root


def worktrees(root: Path) -> int:
    return len(
        subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True).stdout.splitlines()
    )


def test_a_commit_and_the_tree_are_measured_in_turns(repository, tmp_path):
    old, new = revisions.measure_in_turns("HEAD", ["ops"], rounds=2, root=repository)
    assert [r.ms for r in old.rows] == [10] and [r.ms for r in new.rows] == [20]
    assert (tmp_path / "log").read_text().split() == ["10", "20", "20", "10"]
    assert len(old.machine["commit"]) == 40 and worktrees(repository) == 1


def test_a_suite_that_fails_is_told_and_leaves_no_worktree(repository):
    with pytest.raises(ValueError, match="no suite nonsense"):
        revisions.measure_in_turns("HEAD", ["nonsense"], root=repository)
    assert worktrees(repository) == 1


@pytest.mark.parametrize("rev", ["no-such-commit", "--help", ""])
def test_an_unknown_commit_is_named(repository, rev):
    with pytest.raises(ValueError, match=f"no commit '{rev}'"):
        revisions.measure_in_turns(rev, ["ops"], root=repository)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_no_worktree(repository, tmp_path, stop):
    call = f"measure_in_turns('HEAD', ['ops'], root=Path({str(repository)!r}))"
    # What runs in the background inherits that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from pathlib import Path; from bench.revisions import measure_in_turns; {call}"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"SLEEP": "60", "TMPDIR": str(temporary)}
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=revisions.ROOT, env=environment, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worktrees(repository) == 2
    # As a terminal's Ctrl-C does, to the whole group; a SIGTERM goes to the one process.
    os.killpg(child.pid, stop) if stop == signal.SIGINT else child.send_signal(stop)
    assert child.wait(30) != 0
    assert worktrees(repository) == 1 and not list(temporary.iterdir())
    shutil.rmtree(repository)
