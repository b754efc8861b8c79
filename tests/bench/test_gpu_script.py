"""gpu.sh: its pieces, their time, their table and what it hands back, with a stand-in for Python on the GPU machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import chip
from bench.suites import SUITES

ROOT = Path(__file__).parents[2]

# Python of a machine with a GPU: a module prints its arguments, writes what it is told to, and ends as STATUS says.
STUB = """#!/usr/bin/env bash
case "$*" in
*find_spec*) exit ${LACKS:-0} ;;
*"pip install"*) touch "$(echo "$TMPDIR"/*)/installed"; sleep 1.1 ;;
*cuda*) echo True ;;
*)
    echo "ran $*; found $(ls "${PYTHONPATH%%:*}" 2>/dev/null)"
    for last; do [ "${before:-}" = --json ] && echo "{}" >"$last"; before=$last; done
    case "$*" in
    *"$BREAKS"*) exit ${CODE:-3} ;;
    *"bench report"*) mkdir -p runs/report && echo page | tee runs/report/report.html >runs/report/ops.png ;;
    *"bench.trace --out"*) echo trace >runs/profile/a.trace.json.gz; truncate -s 17M runs/profile/huge.txt ;;
    esac ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """run(part, ...) of the script in a tree of its own, Python a stand-in; the tree and OUT."""
    for name in ("bench/results", ".whl", "tmp", "out"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    (tmp_path / ".whl" / "some.whl").touch()
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*args: str, **env: str) -> subprocess.CompletedProcess:
        options = {
            "PYTHON": str(stub),
            "TMPDIR": str(tmp_path / "tmp"),
            "OUT": str(tmp_path / "out"),
            "BREAKS": "nothing",
        }
        return run_script(*args, root=tmp_path, **options | env)

    run.root, run.out = tmp_path, tmp_path / "out"
    return run


def run_script(*args: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(
        ["bash", "bench/gpu.sh", *args], cwd=root, env=env, capture_output=True, text=True, timeout=120
    )


def table(done: subprocess.CompletedProcess) -> dict[str, str]:
    """How each piece ended: the last lines, behind an empty one."""
    lines = done.stdout.rpartition("\n\n")[2].splitlines()
    return {line.split()[0]: re.sub(r"\s+\d+ s$", "", line.partition(" ")[2]).strip() for line in lines}


def seconds_of(done: subprocess.CompletedProcess, command: str) -> int:
    return int(re.search(rf"^ran -m {re.escape(command)}.* --seconds (\d+);", done.stdout, re.M)[1])


def test_wheels_are_taken_within_the_time_and_removed(machine):
    done = machine("test", LACKS="1")
    assert done.returncode == 0, done.stderr
    assert "found installed" in done.stdout and 470 <= seconds_of(done, "bench.chip test") < 480
    assert not list((machine.root / "tmp").iterdir())


def test_nothing_is_installed_where_nothing_is_missing(machine):
    assert "found installed" not in machine("test").stdout


def test_a_python_without_torch_fails_and_says_what_to_do(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    done = run_script("test", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "PYTHON=" in done.stderr and "libcudart is missing" in done.stderr


def test_without_a_gpu_it_says_so_and_leaves_the_ledger():
    before = chip.LEDGER.read_bytes() if chip.LEDGER.exists() else None
    done = run_script("test")
    assert done.returncode == 0 and "no GPU" in done.stdout
    assert (chip.LEDGER.read_bytes() if chip.LEDGER.exists() else None) == before


def test_test_hands_back_the_ledgers(machine):
    for name in ("chip", "sanitizer", "ops"):
        (machine.root / "bench" / "results" / f"{name}.json").write_text("{}")
    done = machine("test", "-k", "gelu")
    assert "ran -m bench.chip test -k gelu --seconds" in done.stdout and table(done) == {"test": "ok"}
    assert {path.name for path in machine.out.iterdir()} == {"chip.json", "sanitizer.json"}


def test_tune_goes_on_from_the_results_within_the_rest_of_its_time(machine):
    (machine.root / "bench" / "results" / "tuned.json").write_text("{}")
    done = machine("tune", "--op", "patchify", BREAKS="kernels tune")
    assert done.returncode == 3, "the command's status is the script's"
    assert "kernels tune --cache bench/results/tuned.json --op patchify --seconds" in done.stdout
    assert 460 <= seconds_of(done, "ditfast.kernels tune") <= 470
    assert table(done) == {"tune": "failed, status 3"} and (machine.out / "tuned.json").exists()


def test_bench_runs_every_suite_in_its_share_and_then_the_report(machine):
    done = machine("bench", "--only", "XL")
    names = ("ops", "model", "sample", "memory")
    assert done.returncode == 0 and table(done) == dict.fromkeys((*names, "report"), "ok")
    assert "ran -m bench ops --json bench/results/ops.json --only XL --seconds" in done.stdout
    files = " ".join(f"bench/results/{name}.json" for name in names)
    assert f"ran -m bench report {files} --out runs/report" in done.stdout
    assert {path.name for path in machine.out.iterdir()} == {*(f"{name}.json" for name in names), "report.html"}
    shares = [seconds_of(done, f"bench {name}") for name in names]
    assert all(share > 100 for share in shares) and max(shares) < 530


def test_every_suite_has_a_part_that_runs_it(machine):
    """The breakdown's is `profile`."""
    ran = {name for part in ("bench", "tables") for name in table(machine(part))}
    assert ran == {*SUITES, "report"} - {"breakdown"}


@pytest.mark.parametrize("broken", ["bench ops", "bench memory"])
def test_bench_goes_on_past_a_suite_that_fails(machine, broken):
    done = machine("bench", BREAKS=broken)
    assert done.returncode == 3
    ended = table(done)
    assert ended.pop(broken.split()[1]) == "failed, status 3" and set(ended.values()) == {"ok"} and len(ended) == 4


def test_a_suite_without_a_job_of_the_name_asked_for_is_no_failure_and_no_test_is_one(machine):
    done = machine("bench", "--only", "gelu", BREAKS="bench memory", CODE="5")
    assert done.returncode == 0 and table(done)["memory"] == "no job of that name"
    assert machine("test", "-k", "nothing", BREAKS="bench.chip", CODE="5").returncode == 5


def test_a_piece_that_hangs_is_stopped_at_its_share(machine):
    script = machine.root / "bench" / "gpu.sh"
    script.write_text(script.read_text().replace("LIMIT=530", "LIMIT=8"))
    stub = machine.root / "python"
    stub.write_text(
        stub.read_text().replace("case $* in", "", 1).replace("*)\n", "*)\n  case $* in *ops*) sleep 60 ;; esac\n", 1)
    )
    done = machine("bench")
    assert done.returncode == 124 and table(done)["ops"] == "out of time" and table(done)["model"] == "ok"


def test_profile_without_ncu_says_so_and_leaves_what_is_too_large(machine):
    done = machine("profile", PATH="/usr/bin:/bin")
    assert done.returncode == 0
    assert table(done) == {"breakdown": "ok", "trace": "ok", "ncu": "is not installed here"}
    assert {path.name for path in machine.out.iterdir()} == {"breakdown.json", "a.trace.json.gz"}
    assert "huge.txt stays here: OUT takes 8 files, none above 16 MiB" in done.stdout


def test_profile_asks_ncu_for_one_marked_step_and_leaves_the_clocks_alone(machine):
    ncu = machine.root / "tmp" / "ncu"
    ncu.write_text('#!/usr/bin/env bash\necho "ncu $*"\necho counters >runs/profile/ncu.csv\n')
    ncu.chmod(0o755)
    done = machine("profile", PATH=f"{ncu.parent}:/usr/bin:/bin")
    line = next(line for line in done.stdout.splitlines() if line.startswith("ncu --"))
    assert "--clock-control none" in line and "--profile-from-start off" in line and ", " not in line
    assert line.endswith("-m bench.trace --range --batch 32") and (machine.out / "ncu.csv").exists()


def test_no_more_than_eight_files_are_handed_back(machine):
    (machine.root / "runs" / "profile").mkdir(parents=True)
    for i in range(9):
        (machine.root / "runs" / "profile" / f"0{i}.txt").touch()
    done = machine("profile", PATH="/usr/bin:/bin")
    assert len(list(machine.out.iterdir())) == 8 and "08.txt stays here" in done.stdout


@pytest.mark.parametrize("args", ((), ("tset",)))
def test_an_unknown_part_is_refused(args):
    done = run_script(*args)
    assert done.returncode == 2 and "usage" in done.stderr
