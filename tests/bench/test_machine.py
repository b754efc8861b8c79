"""What a measurement ran on."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import machine


def test_the_machine_object_is_json_and_names_the_device():
    here = machine.machine("cpu")
    assert json.loads(json.dumps(here)) == here
    assert here["kind"] == "cpu" and here["device"] and here["threads"] == torch.get_num_threads()
    assert here["driver"] is None and here["clocks"] is None and here["torch"] == torch.__version__


def test_results_of_another_commit_of_the_same_source_are_of_the_same_machine():
    here = machine.machine("cpu")
    assert not machine.changed(here, here | {"commit": "other", "date": "1970-01-01"})
    for key in machine.IDENTITY:
        assert machine.changed(here, here | {key: "other"}) == [f"{key} {here[key]} and other"]


def test_the_source_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "ditfast").mkdir()
    (tmp_path / "ditfast" / "a.py").write_text("x = 1")
    first = machine.source.__wrapped__()
    (tmp_path / "ditfast" / "notes.md").write_text("not code")
    assert machine.source.__wrapped__() == first
    (tmp_path / "ditfast" / "a.py").write_text("x = 2")
    assert machine.source.__wrapped__() != first


def test_the_ledger_notes_the_gpu_and_the_software(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
    line = machine.machine_line()
    assert line["gpu"] == "a chip" and line.keys() == {"gpu", "torch", "triton", "python", "commit", "date"}


@pytest.fixture
def pynvml(monkeypatch):
    """NVML of a GPU that does not tell its memory clock."""

    class NVMLError(Exception):
        pass

    def clock(handle, kind):
        if kind == "memory":
            raise NVMLError
        return 1980

    module = ModuleType("pynvml")
    vars(module).update(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetMaxClockInfo=clock,
        nvmlDeviceGetPowerManagementLimit=lambda handle: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1234"))
    return module


def test_what_nvml_knows_is_noted_and_the_rest_is_null(pynvml):
    clocks = {"sm_mhz": 1980, "sm_max_mhz": 1980, "memory_mhz": None, "memory_max_mhz": None, "power_limit_w": 700}
    assert machine.nvml(0) == {"driver": "570.1", "clocks": clocks}


def test_without_a_driver_clocks_are_null(pynvml, monkeypatch):
    def init():
        raise pynvml.NVMLError("no driver")

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    assert machine.nvml(0) == {"driver": None, "clocks": None}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.nvml(0) == {"driver": None, "clocks": None}
