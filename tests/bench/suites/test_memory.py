"""The suite `memory`: what is kept is measured, not estimated, and stands beside the estimate."""

import pytest
import torch

from bench import oracles
from bench.contest import Settings
from bench.rows import DITFAST, EAGER
from bench.suites import SMALL, Options, memory
from bench.suites.memory import MemoryJob, contests, table
from ditfast.layers import recompute
from ditfast.plan import POLICIES

CPU = torch.device("cpu")
SETTINGS = Settings(CPU)


def test_rows_of_the_small_suite():
    jobs = [job for job in contests(Options(CPU, SMALL)) if job.model == "tiny"]
    rows = [row for job in jobs for row in job.measure(SETTINGS)]
    ours = {row.extra["policy"]: row.extra for row in rows if row.provider == DITFAST}
    assert tuple(ours) == POLICIES
    kept = {policy: extra["bytes_per_token_layer"] for policy, extra in ours.items()}
    assert kept["none"] > kept["ops"] > kept["mlp"] > kept["block"]
    assert kept["ops"] > kept["block:4"] > kept["block:2"] > kept["block"]
    for extra in ours.values():
        measured, estimate = extra["bytes_per_token_layer"], extra["estimate_per_token_layer"]
        assert extra["error_percent"] == pytest.approx(100 * (estimate / measured - 1))
        assert -20 < extra["error_percent"] < 1, "statistics of a narrow model are not in the estimate"
        assert extra["allocated_per_token_layer"] is None
    peers = {row.provider: row.extra["bytes_per_token_layer"] for row in rows if row.provider != DITFAST}
    assert peers["fast-DiT"] == 64 * 4, "x in fp32"
    assert peers[EAGER] >= kept["none"]
    assert "tiny recompute=mlp" in table(rows) and "fast-DiT" in table(rows)


@pytest.mark.parametrize("policy", ["none", pytest.param("ops", marks=pytest.mark.full)])
@pytest.mark.parametrize("family", ["SiT", "LightningDiT", "LargeDiT"])
def test_every_family_is_measured_against_its_estimate(family, policy):
    (job,) = (j for j in contests(Options(CPU, SMALL)) if family in j.model and j.recompute == policy)
    own, *peers = job.measure(SETTINGS)
    assert -6 < own.extra["error_percent"] < 1, "a narrow model's statistics and modulation are not in it"
    assert [row.provider for row in peers] == ([EAGER] if policy == "none" else [])
    assert all(row.extra["bytes_per_token_layer"] >= own.extra["bytes_per_token_layer"] for row in peers)


def test_a_wrong_estimate_shows(monkeypatch):
    estimate = memory.activation_bytes
    monkeypatch.setattr(memory, "activation_bytes", lambda *args: 2 * estimate(*args))
    row = MemoryJob("tiny", 64, (1, 3), "bf16-fast", "mlp", CPU).measure(SETTINGS)[0]
    assert row.extra["error_percent"] > 80


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
def test_a_forward_that_computes_something_else_is_refused(precision, monkeypatch):
    job = MemoryJob("tiny", 64, (1, 3), precision, "none", CPU)
    assert [row.why_not for row in job.measure(SETTINGS)] == [None, None]
    forward, factor = oracles._Attention.forward, 1.01 if precision == "fp32" else 100
    monkeypatch.setattr(oracles._Attention, "forward", lambda self, x, angles=None: factor * forward(self, x))
    own, eager = job.measure(SETTINGS)
    assert own.why_not is None and "the error of " in eager.extra["refused"]
    assert "bytes_per_token_layer" not in eager.extra


@pytest.mark.parametrize(("module", "careless"), [(recompute, DITFAST), (oracles, "fast-DiT")])
def test_blocks_that_keep_too_little_for_their_backward_are_refused(module, careless, monkeypatch):
    monkeypatch.setattr(module, "checkpoint", lambda block, *inputs, **_: block(*inputs).detach())
    rows = MemoryJob("tiny", 64, (1, 3), "fp32", "block", CPU).measure(SETTINGS)
    refused = {row.provider: row.extra.get("refused", "") for row in rows}
    assert refused.pop(careless).startswith("blocks.0.") and list(refused.values()) == [""]
