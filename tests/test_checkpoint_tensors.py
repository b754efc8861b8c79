"""Tensors of every kind come back from a checkpoint, and from its safetensors files by themselves."""

import json

import pytest
import safetensors.torch
import torch

from ditfast import checkpoint
from ditfast.checkpoint import load, save


@pytest.mark.parametrize("dtype", list(checkpoint._DTYPES), ids=str)
def test_every_dtype_also_scalar_and_empty(tmp_path, dtype):
    value = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    group = {"matrix": value, "scalar": value[0, 1], "empty": value[:0], "odd": value[:1, :3]}
    path = save(tmp_path, 0, {"g": group}, {})
    for loaded in (load(tmp_path).tensors["g"], safetensors.torch.load_file(path / "g.safetensors")):
        assert loaded.keys() == group.keys()
        for name, tensor in group.items():
            assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
            assert torch.equal(loaded[name].float(), tensor.float())


def test_mixed_widths_in_one_group(tmp_path):
    group = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.full((), 2.5),
        "c": torch.ones(1, dtype=torch.float64),
    }
    path = save(tmp_path, 0, {"g": group}, {})
    assert all(torch.equal(load(tmp_path).tensors["g"][name], value) for name, value in group.items())
    data = (path / "g.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    offsets = {name: entry["data_offsets"][0] for name, entry in json.loads(data[8:start]).items()}
    assert all((start + offsets[name]) % value.element_size() == 0 for name, value in group.items()), "unaligned"


def test_strided_shared_and_trained_tensors(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    weight = torch.nn.Parameter(base.clone())
    group = {
        "transposed": base.T, "column": base[:, 2], "expanded": base[:1].expand(3, 6), "tied": base, "same": base,
        "parameter": weight, "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip
    save(tmp_path, 0, {"g": group}, {})
    loaded = load(tmp_path).tensors["g"]
    assert all(torch.equal(loaded[name], value) for name, value in group.items())


def test_odd_names_and_an_empty_group(tmp_path):
    odd = {name: torch.zeros(1) for name in ("", "a b", "ключ", 'quo"te\n', "module.0._x", "a/b")}
    save(tmp_path, 0, {"g": odd, "none": {}}, {})
    loaded = load(tmp_path).tensors
    assert loaded["g"].keys() == odd.keys() and loaded["none"] == {}
