"""The model of a step: its FLOPs are those that run, its worked example is DiT-XL/2 on an H200."""

from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditfast.config import PRECISIONS, ConfigError
from ditfast.hardware import Ceilings, datasheet
from ditfast.layers import BLOCK_VARIANTS, DiT, LargeDiT, LightningDiT, forward_macs, policy_of_block, training_flops
from ditfast.plan import Share, published_model, rates, step_time
from ditfast.plan.step import FACTORS, attention_flops, gemm_flops, optimizer_bytes, stream_bytes

H200 = Ceilings(4300, {"bf16": 790}, "measured", "NVIDIA H200")
NONE = ["none"] * 28
PASS = 256 * 256 * 1152 * 2  # bytes of one pass over an activation (N, D) in bf16


@pytest.fixture(scope="module")
def xl() -> DiT:
    return published_model("DiT-XL/2")


def xl_step(xl: DiT, precision: str = "bf16-fast", policy: str = "none", **share) -> dict[str, float]:
    """Milliseconds of DiT-XL/2 at batch 256 on an H200."""
    held = PRECISIONS[precision]
    time = step_time(xl, held, policy, Share(**{"images": 256} | share), rates(H200, held))
    return asdict(time) | {"total": time.total}


def test_worked_example_flops(xl):
    """performance.md, FLOPs."""
    assert 2 * forward_macs(xl) / 1e9 == pytest.approx(237.24, abs=0.005)
    assert training_flops(xl) / 1e9 == pytest.approx(711.7, abs=0.05)
    modelled = sum(gemm_flops(xl, NONE).values()) + attention_flops(xl, NONE)
    assert modelled == pytest.approx(training_flops(xl), rel=1e-4), "but for gradients of inputs that have none"


def test_worked_example_step(xl):
    """performance.md, step model: its target, where attention is cuDNN's and the MLP's GELU not yet in the GEMM.

    Of each part within 5 %, of all between the target and torch.compile with cuDNN's attention.
    """
    step = xl_step(xl)
    for part, ms in {"gemm": 254, "attention": 29, "elementwise": 22, "optimizer": 7, "rest": 4}.items():
        assert step[part] == pytest.approx(ms, rel=0.05), part
    assert 326 < step["total"] < 379


def test_worked_example_recompute(xl):
    """performance.md: fc1's product again is 11 % more FLOPs, the whole block 33 %."""
    for policy, more in {"mlp": 0.107, "block": 0.33}.items():
        policies = [policy] * 28
        again = sum(gemm_flops(xl, policies).values()) + attention_flops(xl, policies)
        assert again / training_flops(xl) - 1 == pytest.approx(more, abs=0.005)
    order = [xl_step(xl, policy=policy)["total"] for policy in ("none", "ops", "block:4", "mlp", "block")]
    assert order == sorted(order)


def test_passes_of_the_worked_example(xl):
    """performance.md, bytes: of a block boundary 4 forward and 6 backward, 8 of GELU, and 16 back with act for dw2."""
    passes = {name: count / PASS / 28 for name, count in stream_bytes(xl, PRECISIONS["bf16-fast"], NONE, 256).items()}
    assert passes["elementwise"] == pytest.approx((2 + 1 / 28) * 10, rel=0.01)
    assert passes["gelu"] == pytest.approx(8 + 16, rel=0.001)
    assert passes["bias"] == pytest.approx(3 + 1 + 1, rel=0.01)
    again = stream_bytes(xl, PRECISIONS["bf16-fast"], ["ops"] * 28, 256)["elementwise"] / PASS / 28
    assert again - passes["elementwise"] == pytest.approx(2 * 4, rel=0.01)


def test_an_fp32_stream_adds_10_ms(xl):
    """performance.md, under activation memory; there at all of the copy bandwidth."""
    added = xl_step(xl, "bf16")["elementwise"] - xl_step(xl)["elementwise"]
    assert added * FACTORS["elementwise"].value == pytest.approx(10, abs=0.5)


def test_bytes_of_the_optimizer(xl):
    """performance.md: 38 a parameter with fp32 gradients; here those are bf16, and their norm reads them too."""
    count = 674_834_000
    assert optimizer_bytes(xl, PRECISIONS["bf16-fast"])[0] / count == pytest.approx(36 + 2, rel=1e-3)
    # Without masters apart there is no copy to write; autocast's copy and the gradient's cast come in the forward.
    assert optimizer_bytes(xl, PRECISIONS["bf16"])[0] / count == pytest.approx(36 + 4, rel=1e-3)
    assert optimizer_bytes(xl, PRECISIONS["bf16"])[1] / count == pytest.approx(6 + 6, rel=1e-3)
    more = optimizer_bytes(xl, PRECISIONS["bf16"], 2)[0] - optimizer_bytes(xl, PRECISIONS["bf16"])[0]
    assert more / count == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("policy", ["none", "ops", "mlp", "block", "block:2"])
@pytest.mark.parametrize("block", ["adaln_zero", *(pytest.param(b, marks=pytest.mark.full) for b in BLOCK_VARIANTS)])
def test_counted_flops_are_those_that_run(block, policy):
    """Forward and backward under every policy, by PyTorch's counter."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=48, depth=2, num_heads=2, num_classes=7, mlp_ratio=3.0, block=block)
    model.recompute = policy
    x, t, y = torch.randn(3, 4, 8, 8), torch.arange(3), torch.arange(3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, y).square().sum().backward()
    policies = [policy_of_block(policy, i) for i in range(2)]
    modelled = sum(gemm_flops(model, policies).values()) + attention_flops(model, policies)
    assert counter.get_total_flops() == 3 * modelled


@pytest.mark.parametrize("policy", ["none", "ops", "mlp", "block"])
@pytest.mark.parametrize(
    "make", [partial(LightningDiT, patch_size=2, use_qknorm=True), partial(LargeDiT, num_kv_heads=1, multiple_of=16)]
)
def test_counted_flops_of_other_families_are_those_that_run(make, policy):
    torch.manual_seed(0)
    model = make(input_size=8, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=7)
    model.recompute = policy
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)).square().sum().backward()
    policies = [policy_of_block(policy, i) for i in range(2)]
    assert counter.get_total_flops() == 3 * (
        sum(gemm_flops(model, policies).values()) + attention_flops(model, policies)
    )


def test_a_share_has_its_part_of_the_work(xl):
    """GEMMs, attention and norms split by either; the optimizer by tensor parallel and sharding alone."""
    whole, tensor = xl_step(xl), xl_step(xl, parts=4, tensor=4)
    sequence, sharded = xl_step(xl, parts=4), xl_step(xl, optimizer=64)
    for split in (tensor, sequence):
        assert split["gemm"] == pytest.approx(whole["gemm"] / 4, rel=0.02)
        assert split["attention"] == pytest.approx(whole["attention"] / 4)
        assert split["elementwise"] == pytest.approx(whole["elementwise"] / 4)
    assert tensor["optimizer"] == pytest.approx(whole["optimizer"] / 4) and sequence["optimizer"] == whole["optimizer"]
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"] / 64) and sharded["gemm"] == whole["gemm"]
    accumulated = xl_step(xl, images=64, micro_batches=4)
    assert accumulated["gemm"] == pytest.approx(whole["gemm"], rel=0.02)
    assert accumulated["optimizer"] == whole["optimizer"]


def test_few_tokens_are_bound_by_reading_the_weights(xl):
    """A forward and backward of one image of 4 tokens reads every weight three times and more."""
    tiny = published_model("DiT-XL/8", 64)
    seconds = xl_step(tiny, images=1)["gemm"] / 1e3
    assert seconds > 3 * 2 * 674e6 / (4.3e12 * FACTORS["elementwise"].value)


def test_datasheet_ceilings_are_derated():
    held = PRECISIONS["bf16"]
    reached = rates(datasheet("h200"), held)
    assert reached.gemm / 1e12 == pytest.approx(790, rel=0.01) and reached.copy / 1e12 == pytest.approx(4.3, rel=0.01)
    assert rates(H200, held).gemm == 790e12


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(ConfigError, match="V100 SXM has no GEMM rate of bf16, there are fp16, fp32"):
        rates(datasheet("v100"), PRECISIONS["bf16"])
