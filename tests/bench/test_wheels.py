"""The wheels for the GPU machine: one version of each, all that they need, and not too many bytes."""

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import wheels


def wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(f"Requires-Dist: {r}" for r in requires))
    return path


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes the wheel asked for; the commands."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        name, _, version = command[-1].partition("==")
        if version == "0":
            return SimpleNamespace(returncode=1, stderr="no matching distribution")
        wheel(Path(command[command.index("-d") + 1]), name.replace("-", "_"), version, "numpy")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_missing_wheels_are_downloaded_for_the_machine(tmp_path, pip, capsys):
    assert wheels.main(["--into", str(tmp_path)]) == 0
    assert len(pip) == len(wheels.PINS)
    assert {"--python-version=3.12", "--no-deps", "--platform=manylinux_2_28_x86_64"} <= set(pip[0])
    assert "liger_kernel-0.8.5" in capsys.readouterr().out
    assert wheels.main(["--into", str(tmp_path)]) == 0 and len(pip) == len(wheels.PINS), "they are there by now"


def test_other_versions_and_other_packages_are_dropped(tmp_path, pip):
    old, other = wheel(tmp_path, "diffusers", "0.1"), wheel(tmp_path, "other", "1")
    wheels.download(tmp_path)
    assert not old.exists() and not other.exists() and len(list(tmp_path.iterdir())) == len(wheels.PINS)


def test_a_failed_download_is_told(tmp_path, pip, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "PINS", {"diffusers": "0"})
    assert wheels.main(["--into", str(tmp_path)]) == 1
    assert "could not download diffusers==0: no matching distribution" in capsys.readouterr().err


def test_what_a_wheel_needs(tmp_path):
    requires = ("Torch>=2", "PyYAML", "importlib_metadata", "ruff; extra == 'dev'", 'tomli; python_version < "3.11"')
    assert wheels.needs(wheel(tmp_path, "a", "1", *requires)) == {"torch", "pyyaml", "importlib-metadata"}
    later = wheel(tmp_path, "b", "1", 'lazy-importer>=0.1; python_version < "3.15"')
    assert wheels.needs(later) == {"lazy-importer"}


def test_a_package_that_is_neither_there_nor_pinned_is_named(tmp_path):
    path = wheel(tmp_path, "diffusers", "1", "huggingface-hub", "unheard-of>=3")
    with pytest.raises(wheels.WheelError, match=r"diffusers-1-.*needs unheard-of: pin"):
        wheels.check([path])
    wheels.check([path, wheel(tmp_path, "unheard_of", "3")])


def test_too_many_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "LIMIT", wheels.TREE + 10)
    with pytest.raises(wheels.WheelError, match="MiB may travel"):
        wheels.check([wheel(tmp_path, "diffusers", "1")])
