"""The trace of a training step: files that the viewers read, with ditfast's ops in them."""

import gzip
import json

import pytest
import torch

from bench import trace
from ditfast.config import ConfigError


def test_a_step_leaves_a_timeline_and_a_table(tmp_path, capsys):
    assert trace.main(["--model=tiny", "--batch=2", "--precision=fp32", "--device=cpu", f"--out={tmp_path}"]) == 0
    timeline, ops = (tmp_path / f"tiny-2-fp32.{end}" for end in ("trace.json.gz", "ops.txt"))
    assert capsys.readouterr().out.split() == [str(timeline), str(ops)]
    events = json.loads(gzip.decompress(timeline.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::addmm" for event in events) > 4
    assert "aten::addmm" in ops.read_text()


def test_ncu_sees_one_step_between_the_marks(monkeypatch):
    seen = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: seen.append(name))
    trace.mark(lambda: seen.append("step"), torch.device("cpu"))
    assert seen == ["start", "step", "stop"]


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="DiT-Q/2"):
        trace.main(["--model=DiT-Q/2", "--device=cpu"])
