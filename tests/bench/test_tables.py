"""The two tables that users know: their lines, the published figures beside, and what each line measures."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.contest import Settings
from bench.rows import Row
from bench.suites import GPU, SMALL, Options
from bench.tables import fast_dit, mindone
from ditfast import convert
from ditfast.config import PRECISIONS
from ditfast.kernels.peers import PeerError

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, rounds=1, seconds=0.1)


def lines(module, scale=SMALL):
    return {piece.job[1]: piece for piece in module.contests(Options(CPU, scale))}


def test_fast_dits_table_has_every_line_and_the_published_ones_first():
    names = list(lines(fast_dit))
    assert len(names) == 8
    assert [tuple(part.endswith(" on") for part in name.split(", ")) for name in names[:4]] == list(fast_dit.PUBLISHED)


def test_the_published_size_is_measured_on_a_gpu():
    assert lines(fast_dit, GPU)["checkpointing on, mixed on, cached on"].job[3] == "DiT-XL/2, 256 px, batch 128"
    assert "DiT-XL/2, 256 px, batch 64" in lines(mindone, GPU)["step, recompute on, 1 device"].job[3]


def test_a_line_is_measured_for_both_and_stands_beside_the_published():
    rows = lines(fast_dit)["checkpointing on, mixed on, cached on"].measure(SETTINGS)
    assert [(row.provider, row.why_not) for row in rows] == [("ditfast", None), ("fast-DiT", None)]
    for row in rows:
        assert row.extra["steps_per_s"] == pytest.approx(1e3 / row.ms)
        assert row.peak_bytes > 0 and row.extra["state_bytes"] > 0
    [line] = fast_dit.table(rows).splitlines()[2:]
    assert "0.84" in line and "27,485" in line


def test_a_line_without_features_encodes_images_in_every_step(monkeypatch):
    pytest.importorskip("diffusers")
    calls = []
    encode = fast_dit.Encoder.__call__
    monkeypatch.setattr(fast_dit.Encoder, "__call__", lambda self: calls.append(encode(self)) or calls[-1])
    piece = lines(fast_dit)["checkpointing off, mixed off, cached off"]
    own, peer = piece.measure(SETTINGS)
    assert own.why_not is None and peer.why_not is None
    assert {x.shape for x in calls} == {(2, 4, 8, 8)} and len(calls) >= 8
    assert own.extra["vae_channels"] == [32, 32, 32, 32]


def test_without_diffusers_a_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(PeerError, match=r"ditfast\[vae\]"):
        fast_dit.Encoder(64, 2, (32, 32), CPU)


def test_out_of_memory_stands_in_the_table():
    row = Row("fast-dit", "checkpointing off, mixed off, cached off", "ditfast", "fp32", "DiT-XL/2",
              extra={"failed": "OutOfMemoryError: CUDA out of memory"})  # fmt: skip
    [line] = fast_dit.table([row]).splitlines()[2:]
    assert line.count("out of memory") == 2


def test_a_step_of_mindones_table():
    [row] = lines(mindone)["step, recompute on, 1 device"].measure(SETTINGS)
    assert row.suite == "mindone" and row.ms > 0 and row.extra["recompute"] == "block"
    assert "0.95 s, 67.37 images/s" in mindone.table([row])


def test_loading_reads_the_file():
    [row] = lines(mindone)["checkpoint loading"].measure(SETTINGS)
    assert row.ms > 0 and row.extra["file_bytes"] > 10**5


def flip_a_bit(load, weights, *arguments):
    network = load(weights, *arguments)
    bits = network.model.final_layer.linear.bias.view(torch.int32)
    bits[0] ^= 1
    return network


def leave_one_out(load, weights, *arguments):
    network = load(weights, *arguments)
    network.model.y_embedder.embedding_table = torch.nn.Identity()
    return network


def raw_weights(load, weights, *arguments):
    model, _ = convert.load_official(weights.origin.split(" (")[0], "model")
    return load(replace(weights, groups={"model": model}), *arguments)


def another_dtype(load, weights, device, precision):
    return replace(load(weights, device, "bf16-fast"), precision=PRECISIONS[precision])


@pytest.mark.parametrize(("loader", "told"), [
    (flip_a_bit, "final_layer.linear.bias (1 in all) is not what was saved"),
    (leave_one_out, "y_embedder.embedding_table.weight (1 in all) are not in both"),
    (raw_weights, "is not what was saved"), (another_dtype, "is not what was saved"),
])  # fmt: skip
def test_a_loader_of_other_weights_is_refused(loader, told, monkeypatch):
    monkeypatch.setattr(mindone, "load_network", partial(loader, mindone.load_network))
    [row] = lines(mindone)["checkpoint loading"].measure(SETTINGS)
    assert row.ms is None and told in row.extra["refused"]


def test_loading_in_a_fast_precision_rounds_the_weights():
    sizes = replace(mindone.SIZES["small"], precision="bf16-fast")
    [row] = mindone._loading(sizes, CPU, ("mindone", "checkpoint loading", "bf16", "tiny"), SETTINGS)
    assert row.ms > 0 and row.why_not is None


@pytest.mark.full
def test_sampling_takes_250_steps():
    [row] = lines(mindone)["DDPM-250 sampling, 1 image"].measure(SETTINGS)
    assert row.ms > 0 and row.why_not is None


@pytest.mark.full
def test_the_first_step_is_timed_in_a_process_of_its_own():
    [row] = lines(mindone)["compile of the training step"].measure(SETTINGS)
    assert row.extra["first_step_s"] > row.extra["later_step_s"] > 0


def test_published_lines_that_were_not_measured_say_so():
    text = mindone.table([])
    assert text.count("not measured") == len(mindone.PUBLISHED)
