"""The machine's limits: measured, kept, and found again."""

import torch

from bench import limits

CPU = torch.device("cpu")


def test_limits_are_positive_and_of_this_machine():
    found = limits.measure(CPU, copy_bytes=2**20, size=64)
    assert found.source == "measured" and found.machine.endswith("threads") and found.torch == torch.__version__
    assert found.copy_gbps > 0 and set(found.gemm_tflops) == {"bf16", "fp16", "fp32"}


def test_limits_are_measured_once(tmp_path, monkeypatch):
    calls = []
    measure = limits.measure

    def counted(device):
        calls.append(device)
        return measure(device, copy_bytes=2**20, size=64)

    monkeypatch.setattr(limits, "measure", counted)
    path = tmp_path / "ceilings.json"
    first = limits.of(CPU, path)
    assert limits.of(CPU, path) == first and calls == [CPU]


def test_limits_of_other_threads_are_other_limits(tmp_path, monkeypatch):
    path = tmp_path / "ceilings.json"
    limits.hardware.save_measured(limits.measure(CPU, copy_bytes=2**20, size=64), path)
    assert limits.hardware.measured(limits.limits_name(CPU), path) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert limits.hardware.measured(limits.limits_name(CPU), path) is None


def test_the_command_measures_and_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = limits.measure(CPU, copy_bytes=2**20, size=64)
    monkeypatch.setattr(limits, "measure", lambda device: found)
    assert limits.main(["--device", "cpu"]) == 0
    assert "GEMM fp32" in capsys.readouterr().out
    assert (tmp_path / "ditfast" / "ceilings.json").exists()
