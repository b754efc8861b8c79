"""Which class a profiled op or kernel counts for, and that a step's classes are all of its time."""

import time

import pytest
import torch

from bench import breakdown
from bench.contest import Settings
from bench.suites import SMALL, Options
from ditfast.hardware import Ceilings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::addmm", "aten::linear"], "GEMM"),
        (["aten::mm", "AddmmBackward0"], "GEMM"),
        (["aten::bmm", "aten::matmul", "ditfast::attention_bwd"], "attention"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::mul", "ditfast::adaln_modulate_fwd"], "norm, modulate, gate"),
        (["aten::mul", "MulBackward0"], "norm, modulate, gate"),
        (["aten::native_layer_norm_backward"], "norm, modulate, gate"),
        (["aten::gelu_backward"], "GELU"),
        (["aten::addmm", "ditfast::gelu_mlp_fwd"], "GEMM"),
        (["aten::copy_", "aten::_to_copy", "aten::to"], "casts and copies"),
        (["aten::mul_", "ditfast::adamw_ema"], "optimizer"),
        (["aten::_fused_adamw_"], "optimizer"),
        (["aten::mul", "ditfast::diffusion_loss_fwd"], "loss"),
        (["aten::stack", "data"], "data"),
        (["aten::arange"], "other"),
        (["_gelu_mlp_fwd_kernel"], "GELU"),
        (["nvjet_hsh_256x128", "cudaLaunchKernel", "aten::mm"], "GEMM"),
    ],
)
def test_ops_have_the_class_of_what_they_are_for(names, kind):
    assert breakdown.kernel_class(names) == kind
    assert kind in breakdown.CLASSES


def test_the_classes_add_up_to_the_time_and_what_is_no_op_is_other():
    a = torch.randn(256, 256)

    def run():
        torch.mm(a, a)
        time.sleep(0.2)

    spent = breakdown.profiled(run, CPU)
    assert spent["GEMM"] > 0
    assert 200 <= spent["other"] <= sum(spent.values()) < 2000


def test_a_step_is_broken_down_for_both_providers():
    job, *_ = breakdown.contests(Options(CPU, SMALL))
    limits = Ceilings(20.0, {"fp32": 0.1}, "measured", "a CPU")
    own, eager = job.measure(Settings(CPU, limits, rounds=1, seconds=0.1))
    assert (own.provider, eager.provider) == ("ditfast", "eager") and own.job == eager.job == job.job
    for row in (own, eager):
        classes = row.extra["classes"]
        assert list(classes) == list(breakdown.CLASSES)
        for kind in ("GEMM", "attention", "norm, modulate, gate", "GELU", "optimizer", "data"):
            assert classes[kind] > 0, kind
    least = own.extra["least_ms"]
    assert "least_ms" not in eager.extra and set(least) <= set(breakdown.CLASSES)
    assert 0 < least["GEMM"] < own.extra["classes"]["GEMM"]
    text = breakdown.table([own, eager])
    assert len(text.splitlines()) == len(breakdown.CLASSES) + 1


def test_without_a_rate_of_the_dtype_there_are_no_limits():
    job, *_ = breakdown.contests(Options(CPU, SMALL))
    own, _ = job.measure(Settings(CPU, Ceilings(20.0, {"bf16": 0.1}, "measured", "a CPU"), rounds=1, seconds=0.1))
    assert own.extra["least_ms"] == {}


def test_a_wrong_step_is_refused_and_the_other_broken_down(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *_: None)
    job, *_ = breakdown.contests(Options(CPU, SMALL))
    eager, own = job.measure(Settings(CPU, None, rounds=1, seconds=0.1))
    assert eager.ms is None and "the error of EMA" in eager.extra["refused"]
    assert own.ms and "eager refused: the error of EMA" in breakdown.table([eager, own])
