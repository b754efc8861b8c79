"""Datasheet figures are found by device names as drivers give them; measured ceilings come back as they were saved."""

import json

import pytest
import torch

from ditfast.config import PRECISIONS, ConfigError
from ditfast.hardware import (
    GPUS,
    Ceilings,
    cache_path,
    datasheet,
    dtype_name,
    find_gpu,
    gpu,
    measured,
    rate_name,
    save_measured,
)


@pytest.mark.parametrize("name, entry", [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("h100", "H100 SXM"), ("H100-SXM", "H100 SXM"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA GH200 480GB", "GH200"),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"), ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"), ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
    ("NVIDIA A10G", "A10G"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("NVIDIA RTX A6000", "RTX A6000"),
])  # fmt: skip
def test_a_gpu_is_found_by_its_drivers_name_and_by_a_short_one(name, entry):
    assert gpu(name).name == entry


@pytest.mark.parametrize(
    "name",
    (
        "NVIDIA RTX A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "RTX 4090 D",
        "NVIDIA A100-SXM-64GB",
        "cpu",
    ),
)
def test_another_chip_of_a_like_name_is_not_taken_for_a_listed_one(name):
    assert find_gpu(name) is None


def test_an_unknown_gpu_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'h1000'.*Did you mean 'h100'"):
        gpu("h1000")
    with pytest.raises(ConfigError, match="known: B200, .*A100 SXM 40GB"):
        gpu("quantum")


def test_every_name_finds_its_own_entry():
    assert all(gpu(entry.words) is entry and gpu(entry.name) is entry for entry in GPUS)


def test_datasheet_rates_are_of_the_dtypes_the_chip_has():
    assert datasheet("h200") == Ceilings(4800, {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}, "datasheet", "H200")
    assert "bf16" not in datasheet("v100").gemm_tflops


def test_dtypes_have_names():
    assert [dtype_name(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == ["bf16", "fp16", "fp32"]
    assert dtype_name(torch.float32, tf32=True) == "tf32"
    with pytest.raises(ValueError, match=r"torch\.float64.*torch\.bfloat16"):
        dtype_name(torch.float64)


def test_a_precision_policy_has_the_rate_of_its_products():
    names = {name: rate_name(precision) for name, precision in PRECISIONS.items()}
    assert (names["fp32"], names["tf32"], names["bf16-fast"], names["fp16"]) == ("fp32", "tf32", "bf16", "fp16")


H200 = Ceilings(4300, {"bf16": 790}, "measured", "NVIDIA H200", torch.__version__)


def test_measured_ceilings_come_back_for_the_same_device_and_pytorch_alone(tmp_path):
    path = tmp_path / "made" / "ceilings.json"
    older = Ceilings(4000, {"bf16": 700}, "measured", "NVIDIA H200", "2.0")
    for each in (older, H200, Ceilings(20, {"fp32": 0.1}, "measured", "some CPU", torch.__version__)):
        assert save_measured(each, path) == path
    assert measured("NVIDIA H200", path) == measured("h200", path) == H200
    assert measured("NVIDIA H200", path, "2.0") == older
    assert measured("some CPU", path).copy_gbps == 20
    assert measured("NVIDIA H100 80GB HBM3", path) is None and measured("h200", tmp_path / "none.json") is None


def test_a_second_measurement_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "ceilings.json"
    for rate in (700, 790):
        save_measured(Ceilings(4300, {"bf16": rate}, "measured", "NVIDIA H200", "2.11"), path)
    assert len(json.loads(path.read_text())) == 1 and measured("h200", path, None).gemm_tflops == {"bf16": 790}


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_measured(H200)
    assert cache_path() == tmp_path / "ditfast" / "ceilings.json" and measured("h200") == H200


def test_only_measured_ceilings_are_kept(tmp_path):
    with pytest.raises(ValueError, match="only measured"):
        save_measured(datasheet("h200"), tmp_path / "ceilings.json")


@pytest.mark.parametrize("text", ("{", "[1]", '{"a": 1}', '{"a": {"copy_gbps": 1}}'))
def test_a_damaged_file_is_refused_by_name(text, tmp_path):
    path = tmp_path / "ceilings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"ceilings\.json is no file of measured ceilings"):
        measured("h200", path)


@pytest.mark.parametrize("wrong", (
    {"copy_gbps": 0}, {"copy_gbps": "4300"}, {"gemm_tflops": {"bf16": float("nan")}}, {"gemm_tflops": {"bfloat16": 1}},
    {"source": "guess"},
))  # fmt: skip
def test_ceilings_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="must be|is by bf16, fp16"):
        Ceilings(**{"copy_gbps": 1.0, "gemm_tflops": {}, "source": "measured", "machine": "m"} | wrong)
