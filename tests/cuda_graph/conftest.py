"""CUDA graphs on a machine without a GPU, and what lets them be asked for there."""

import contextlib

import pytest
import torch

from tests.cuda_graph.stand_in import GPU, StandIn, Stream, capture


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Lets CUDA graphs be made on a machine without a GPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(Stream, "events", [])
    if GPU:
        return
    current = Stream()
    current.name = "current"
    replaced = {
        "CUDAGraph": StandIn, "Stream": Stream, "graph": capture, "graph_pool_handle": object,
        "current_stream": lambda device: current, "stream": lambda stream: contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Labels are looked at on a CPU only.
    monkeypatch.setattr("ditfast.layers.embed.check_labels", lambda labels, rows: None)


@pytest.fixture
def allowed(monkeypatch):
    """As if this were a GPU, for what refuses others."""
    if not GPU:
        for module in ("train", "sample"):
            monkeypatch.setattr(f"ditfast.{module}.check_cuda_graph", lambda *args, **kwargs: None)
