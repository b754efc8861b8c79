"""What `accelerate` says of a model: the ops of its blocks, their backends, and the check that they run."""

import pytest
import torch

import ditfast
from ditfast.kernels._op import recording_calls


def test_ops_of_one_block(subject):
    ditfast.accelerate(subject.model)
    inside = []
    subject.block().register_forward_pre_hook(lambda *_: calls.clear())
    subject.block().register_forward_hook(lambda *_: inside.extend(op for op, _ in calls))
    with recording_calls() as calls:
        subject.run()
    assert tuple(inside) == subject.ops


def test_the_report(subject):
    report = ditfast.accelerate(subject.model)
    text = str(report)
    assert len([part for part in report.taken if part.form.is_block]) == 2
    assert report.left == {}
    assert f"2  {subject.blocks}.*  " in text
    assert "gate_residual_adaln_modulate (reference), gate_residual (reference)" in text
    assert ("x_embedder" if subject.blocks == "blocks" else "norm_out, proj_out_1, proj_out_2") in text
    assert "Between blocks nothing is fused" in text
    assert "ditfast.layers.DiT" in text


def test_check_returns_what_ran_and_leaves_no_trace(subject):
    report = ditfast.accelerate(subject.model.train())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ran = report.check(*subject.args, **subject.kwargs)
    assert set(ran) == {part.path for part in report.taken}
    assert ran[f"{subject.blocks}.1"][-1] == ("gate_residual", "reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


def test_check_misses_what_is_not_called(subject):
    report = ditfast.accelerate(subject.model)
    delattr(subject.model.get_submodule(subject.blocks), "1")
    with pytest.raises(AssertionError, match=rf"{subject.blocks}\.1\S* .* was not called"):
        report.check(*subject.args, **subject.kwargs)


def test_check_of_a_restored_model_fails(subject):
    report = ditfast.accelerate(subject.model)
    ditfast.restore(subject.model)
    with pytest.raises(AssertionError, match="ran no op"):
        report.check(*subject.args, **subject.kwargs)


def test_a_backend_for_some_ops_and_again_for_others(subject):
    op = subject.ops[2] if subject.ops[0] == "timestep_embedding" else subject.ops[1]
    assert ditfast.accelerate(subject.model).backends[op] == "sdpa"
    report = ditfast.accelerate(subject.model, backend={op: "reference"})
    assert report.backends[op] == "reference"
    with recording_calls() as calls:
        subject.run()
    assert {backend for name, backend in calls if name == op} == {"reference"}
    ditfast.accelerate(subject.model)
    with recording_calls() as calls:
        subject.run()
    assert {backend for name, backend in calls if name == op} == {"sdpa"}
