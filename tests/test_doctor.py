"""The doctor reports what is here and what is not."""

import json
import re

import pytest
import torch

from ditfast import doctor, kernels


def test_report_names_every_op_with_its_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    for spec in kernels.OPS:
        row = next(line for line in lines if line.startswith(f"│ {spec.name} "))
        for device, _ in doctor.devices():
            assert kernels.backend_of(spec.name, device, torch.bfloat16) in row


def test_a_missing_package_says_how_to_get_it():
    package = doctor.Package("no-such-thing", "no_such_thing", "nothing", "pip install no-such-thing")
    assert doctor.package_state(package) == ("missing", "pip install no-such-thing")


def test_a_present_package_has_a_version():
    assert doctor.package_state(next(p for p in doctor.PACKAGES if p.module == "sklearn"))[0][0].isdigit()


def test_an_op_that_cannot_run_fails_the_report(monkeypatch, capsys):
    def broken(*args):
        raise kernels.BackendError("triton is not installed; pip install triton")

    monkeypatch.setattr(kernels, "backend_of", broken)
    assert doctor.doctor() == 1
    assert "triton is not" in capsys.readouterr().out


def test_every_device_is_listed():
    assert [device.type for device, _ in doctor.devices()] == ["cpu"] + ["cuda"] * torch.cuda.device_count()


def test_each_attention_library_is_listed_as_unproven_with_what_it_lacks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(doctor, "LEDGER", tmp_path / "chip.json")
    doctor.doctor()
    lines = capsys.readouterr().out.splitlines()
    device = doctor.devices()[-1][0]
    for name in ("cudnn", "flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers"):
        row = next(line for line in lines if line.startswith(f"│ {name} "))
        assert "unproven" in row and doctor.library_state(name, device) in row


def test_a_library_is_proven_by_the_ledger_once_both_forms_passed(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEDGER", tmp_path / "chip.json")
    entry = {"version": "2.8.3", "gpu": "NVIDIA H200"}
    doctor.LEDGER.write_text(json.dumps({"attention/flash-attn-2": entry}))
    assert doctor.library_proof("flash-attn-2") == "unproven"
    doctor.LEDGER.write_text(json.dumps({f"{op}/flash-attn-2": entry for op in ("attention", "attention_qkvpacked")}))
    assert doctor.library_proof("flash-attn-2") == "2.8.3 passed on NVIDIA H200"
    assert doctor.library_proof("xformers") == "unproven"


@pytest.mark.parametrize("model, unit", [("digits", "MB"), ("DiT-XL/2", "GB")])
def test_memory_has_a_unit_of_its_size(model, unit, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    doctor.memory(model, batch_size=4)
    printed = capsys.readouterr().out
    assert re.search(rf": \d\d\.\d {unit} of weights", printed) and f"activations, {unit}" in printed
