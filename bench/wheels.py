"""Fills .whl/ with the packages that the GPU machine lacks: `python -m bench.wheels`, where there is a network.

bench/gpu.sh installs them there, without one. The machine has Linux on x86-64, Python 3.12 and what is in ON_MACHINE.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# One version of each: two stop the installation. importlib-metadata is for diffusers; from 9 on it needs yet another.
PINS = {
    "jsonargparse": "4.53.0",
    "diffusers": "0.42.1",
    "importlib-metadata": "8.7.1",
    "liger-kernel": "0.8.5",
    "xformers": "0.0.35",
}
# Of what the machine's image holds, what the pinned packages need.
ON_MACHINE = {
    "filelock", "huggingface-hub", "numpy", "pillow", "pyyaml", "regex", "requests", "safetensors", "torch", "triton",
    "zipp",
}  # fmt: skip
LIMIT = 64 * 2**20  # bytes that travel there, the source tree included
TREE = 8 * 2**20  # of them for the source tree
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


class WheelError(RuntimeError):
    """A folder of wheels that the machine could not use; the message says what is missing or too large."""


def download(folder: Path) -> list[Path]:
    """The pinned wheels, downloaded where they are missing; others are dropped. WheelError for a failed download."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        if PINS.get(_name(path)) != _version(path):
            path.unlink()
    there = {_name(path) for path in folder.glob("*.whl")}
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    for name, version in PINS.items():
        if name in there:
            continue
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WheelError(f"pip could not download {name}=={version}: {done.stderr.strip()}")
    return sorted(folder.glob("*.whl"))


def check(wheels: Sequence[Path]) -> None:
    """WheelError for packages that need others which are neither wheels nor on the machine, and for too many bytes."""
    have = ON_MACHINE | {_name(path) for path in wheels}
    for path in wheels:
        if missing := sorted(needs(path) - have):
            raise WheelError(f"{path.name} needs {', '.join(missing)}: pin them in bench/wheels.py, or another version")
    if (size := sum(path.stat().st_size for path in wheels)) > LIMIT - TREE:
        raise WheelError(f"the wheels are {size / 2**20:.1f} MiB, of which {(LIMIT - TREE) // 2**20} MiB may travel")


def needs(path: Path) -> set[str]:
    """The packages that a wheel requires on Python 3.12, extras left out."""
    with zipfile.ZipFile(path) as wheel:
        (entry,) = (name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = wheel.read(entry).decode().splitlines()
    required = [line.partition(":")[2] for line in lines if line.startswith("Requires-Dist:")]
    plain = [each for each in required if "extra ==" not in each and not _is_old(each)]
    return {re.sub(r"[-_.]+", "-", m[0]).lower() for each in plain if (m := re.search(r"[\w.-]+", each))}


def _is_old(requirement: str) -> bool:
    """Whether it is for Pythons before 3.12 alone."""
    bound = re.search(r'python_(?:full_)?version\s*<\s*"3\.(\d+)', requirement)
    return bound is not None and int(bound[1]) <= 12


def _name(path: Path) -> str:
    return path.name.split("-")[0].replace("_", "-").lower()


def _version(path: Path) -> str:
    return path.name.split("-")[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, checks and lists; 1 with the reason where the machine could not use them."""
    parser = argparse.ArgumentParser(prog="python -m bench.wheels", description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / ".whl", help="the folder, .whl by default")
    options = parser.parse_args(argv)
    try:
        wheels = download(options.into)
        check(wheels)
    except WheelError as error:
        print(error, file=sys.stderr)
        return 1
    for path in wheels:
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
