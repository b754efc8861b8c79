"""The ops suite: every op does its job in it, and one that does not is refused."""

from dataclasses import replace

import pytest
import torch

from bench.contest import Settings
from bench.rows import DITFAST
from bench.suites import CPU, GPU, SMALL, Options
from bench.suites.ops import Match, contests
from ditfast.kernels import OPS

DEVICE = torch.device("cpu")
SETTINGS = Settings(DEVICE, rounds=3, seconds=0.0)
SPECS = {spec.name: spec for spec in OPS}


def measured(spec, scale=SMALL):
    """Rows by (pass, provider)."""
    found = contests(Options(DEVICE, scale), (spec,))
    return {(row.extra.get("pass"), row.provider): row for c in found for row in c.measure(SETTINGS) if row.ms}


def wrong(spec, change):
    """The spec with a public function that is not right, the reference being as it was."""

    def fn(*, backend="auto", **inputs):
        return spec.fn(**inputs, backend=backend) if backend == "reference" else change(spec.fn, inputs)

    return replace(spec, fn=fn)


class Doubled(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 2 * dx


@pytest.mark.parametrize(
    "change",
    (
        lambda fn, inputs: fn(**inputs) * 1.001,
        lambda fn, inputs: fn(**{**inputs, "gate": inputs["gate"] * 1.01}),
        lambda fn, inputs: Doubled.apply(fn(**inputs)),
        lambda fn, inputs: fn(**inputs) * float("nan"),
    ),
    ids=("0.1 % off", "another gate", "twice the gradient", "NaN"),
)
def test_a_wrong_op_is_refused_forward_and_backward(change):
    found = list(contests(Options(DEVICE, SMALL), (wrong(SPECS["gate_residual"], change),)))
    assert [contest.extra["pass"] for contest in found] == ["fwd", "bwd"]
    for contest in found:
        rows = {row.provider: row for row in contest.measure(SETTINGS)}
        assert rows[DITFAST].ms is None and "allowed" in rows[DITFAST].extra["refused"]
        assert rows["eager"].ms is not None


def test_a_wrong_op_in_place_is_refused():
    def change(fn, inputs):
        fn(**inputs)
        inputs["grad"].mul_(1.001)

    spec = wrong(SPECS["gelu_backward"], change)
    (contest,) = contests(Options(DEVICE, SMALL), (spec,))
    assert "out" in contest.admit(DITFAST)["refused"] and contest.admit("eager") is None


def test_a_wrong_peer_is_refused():
    spec = SPECS["gate_residual"]
    spec = replace(spec, peers={"wrong": lambda **inputs: spec.fn(**inputs) * 1.001})
    fwd, _ = contests(Options(DEVICE, SMALL), (spec,))
    assert fwd.admit("wrong")["refused"].startswith("in float32: out0: max error")
    assert fwd.admit(DITFAST) is None


def test_forward_and_backward_are_timed_apart():
    rows = measured(SPECS["attention"])
    fwd, bwd = rows["fwd", DITFAST], rows["bwd", DITFAST]
    assert (fwd.name, bwd.name) == ("attention fwd", "attention bwd")
    assert fwd.extra["backend"] == "sdpa" and bwd.extra["flops"] == 2 * fwd.extra["flops"] > 0
    assert {provider for _, provider in rows} == {DITFAST, "eager"}


def test_libraries_that_are_backends_enter_by_name_and_are_absent_without_a_gpu():
    fwd, _ = contests(Options(DEVICE, SMALL), (SPECS["attention"],))
    rows = {row.provider: row for row in fwd.measure(SETTINGS)}
    for name in ("cudnn", "flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "transformer-engine"):
        assert "absent" in rows[name].extra, name


def test_an_op_in_place_finds_its_inputs_as_they_were():
    spec, seen = SPECS["gelu_backward"], []

    def noting(**inputs):
        seen.append(inputs["grad"].sum().item())
        spec.fn(**inputs)

    match = Match(spec, spec.cases[0], "fp32", Options(DEVICE, SMALL))
    run = match.run("fwd", noting)
    run(), run()
    assert seen[0] == seen[1]


def test_the_float64_truth_is_gone_when_all_are_judged():
    options = Options(DEVICE, SMALL)
    match = Match(SPECS["attention"], SPECS["attention"].cases[0], "fp32", options)
    fwd, bwd = match.contests()
    refused = {provider: fwd.admit(provider) for provider in list(fwd.entrants)[:-1]}
    assert match._truth is not None and "absent" in refused["cudnn"]
    fwd.admit(list(fwd.entrants)[-1])
    assert match._truth is None
    assert {provider: bwd.admit(provider) for provider in refused} == refused and match._truth is None


def test_inputs_are_drawn_when_they_are_needed(monkeypatch):
    monkeypatch.setattr(Match, "inputs", None)
    found = list(contests(Options(torch.device("cpu"), GPU), (SPECS["adaln_modulate"],)))
    assert len(found) == 2 * len(SPECS["adaln_modulate"].bench)
    assert len({contest.job for contest in found}) == len(found)


@pytest.mark.parametrize("scale", (SMALL, CPU, GPU), ids=lambda scale: scale.name)
def test_every_op_has_its_contests_and_its_bytes(scale):
    found = list(contests(Options(DEVICE, scale)))
    assert {contest.extra["op"] for contest in found} == set(SPECS)
    assert len({contest.job for contest in found}) == len(found)
    assert all(contest.bytes > 0 and contest.shape for contest in found)


@pytest.mark.full
def test_torch_compile_is_timed_and_the_ratio_is_to_it():
    rows = measured(SPECS["gate_residual"], replace(SMALL, compile=True))
    for stage in ("fwd", "bwd"):
        compiled, own = rows[stage, "compile"], rows[stage, DITFAST]
        assert compiled.ratio_to_compile == 1 and own.ratio_to_compile == pytest.approx(compiled.ms / own.ms)
