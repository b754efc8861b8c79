"""compute-sanitizer over one small case of every op's kernels: `python -m bench.sanitize`; part of gpu.sh test.

memcheck sees reads and writes outside of a tensor, racecheck races in shared memory. bench/results/sanitizer.json maps
each op to the hash of its source and the tools that it passed; an op that fails one is in neither this file nor the
ledger of chip.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import chip
from bench.machine import machine_line
from ditfast.kernels import parity

RESULTS = chip.ROOT / "bench" / "results" / "sanitizer.json"
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status of compute-sanitizer where it found something
PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/cuda*/bin")


def find(places: Sequence[str] = PLACES) -> str | None:
    """The path of compute-sanitizer: in PATH, a CUDA toolkit, or a wheel beside PyTorch; None where there is none."""
    wheels = Path(torch.__file__).parents[1] / "nvidia" / "*" / "bin"
    hits = (hit for place in (*places, str(wheels)) for hit in Path("/").glob(f"{place.lstrip('/')}/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or next((str(hit) for hit in hits if os.access(hit, os.X_OK)), None)


def run_cases(names: Sequence[str]) -> None:
    """Forward and backward of the first case of the named ops."""
    for spec in chip.KERNEL_OPS:
        if spec.name in names:
            generator = torch.Generator("cuda").manual_seed(0)
            inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, "cuda", generator)
            douts = parity.random_douts(parity.run(spec, inputs, "triton"), generator)
            parity.run(spec, inputs, "triton", douts)
            torch.cuda.synchronize()


def passes(sanitizer: str, tool: str, names: Sequence[str], deadline: float) -> bool:
    """Whether these ops, in one process, pass a tool; TimeoutExpired after the deadline, RuntimeError where it fails.

    Without PyTorch's caching of memory each tensor is an allocation of its own, beyond which memcheck looks.
    """
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "bench.sanitize"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, "--cases", *names], cwd=chip.ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(deadline - time.monotonic(), 0),
    )  # fmt: skip
    if done.returncode not in (0, FOUND):
        raise RuntimeError(f"{tool} itself failed on {', '.join(names)}:\n{done.stdout[-4000:]}")
    if done.returncode:
        print(done.stdout[-4000:])
    return done.returncode == 0


def sanitize(seconds: float, results: Path = RESULTS) -> set[str]:
    """Run the tools, keep what passed in `results`, and return the ops that failed one."""
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer: skipped, it is neither in PATH nor in a CUDA toolkit of this machine")
        return set()
    deadline, names = time.monotonic() + seconds, [spec.name for spec in chip.KERNEL_OPS]
    passed: list[str] = []
    failed: set[str] = set()
    for tool in TOOLS:
        try:
            # All in one process, as starting one takes most of the time; each alone only to find out which one failed.
            if not passes(sanitizer, tool, names, deadline):
                failed |= {name for name in names if not passes(sanitizer, tool, [name], deadline)} or set(names)
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer: no time left for {tool}")
            break
        except RuntimeError as error:
            print(f"compute-sanitizer: {error}")
            break
        passed.append(tool)
        print(f"compute-sanitizer {tool}: {', '.join(sorted(failed)) + ' FAILED' if failed else 'all ops passed'}")
    for name in failed:
        chip.forget(name, results)
    if passed:
        chip.record([n for n in names if n not in failed], machine_line() | {"passed": passed}, results)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tools on this machine's GPU; --cases is what runs under them."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="stop after this long")
    parser.add_argument("--cases", nargs="+", metavar="OP", help="run the small cases of these ops, nothing else")
    options = parser.parse_args(argv)
    if options.cases:
        run_cases(options.cases)
        return 0
    return int(bool(sanitize(options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
