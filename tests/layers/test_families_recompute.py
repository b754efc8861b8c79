"""Recompute policies of the other families: bytes kept, equal bits over a training, also compiled."""

import pytest
import torch

from ditfast.config import PRECISIONS
from ditfast.layers import activation_bytes

POLICIES = ("none", "ops", "mlp", "block", "block:2")


def trained(family, policy, precision="fp32", steps=20):
    """The losses and weights of a few steps, whatever the policy."""
    model = PRECISIONS[precision].apply(family.make(depth=2))
    model.recompute = policy
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, losses = family.batch(model), []
    for _ in range(steps):
        with PRECISIONS[precision].autocast("cpu"):
            loss = (model(*inputs).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


TRAINED = ("SiT", "LightningDiT-qknorm", "LightningDiT-options", "LargeDiT-gqa-norm")


@pytest.mark.parametrize("family, precision", [
    *((name, precision) for name in TRAINED for precision in ("fp32", "bf16")),
    *(pytest.param(name, "bf16-fast", marks=pytest.mark.full) for name in TRAINED),
    *(pytest.param(name, p, marks=pytest.mark.full) for name in ("LightningDiT", "LargeDiT") for p in ("fp32", "bf16")),
], indirect=["family"])  # fmt: skip
def test_training_is_the_same_bits_under_every_policy(family, precision):
    losses, expected = trained(family, "none", precision)
    assert losses[-1] < 0.9 * losses[0]
    for policy in POLICIES[1:]:
        ours, weights = trained(family, policy, precision)
        assert ours == losses
        assert [name for name, value in weights.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
def test_the_estimate_is_what_is_kept(family, precision, kept_behind):
    held = PRECISIONS[precision]
    models = {depth: held.apply(family.make(depth=depth, hidden_size=96, input_size=16)) for depth in (1, 2)}
    for policy in POLICIES:
        for model in models.values():
            model.recompute = policy
        # 64 tokens a sample share its modulation (B, 6 D or 4 D).
        rows = models[1].blocks[0].adaLN_modulation[1].out_features
        measured = kept_behind(models, precision, family.batch) - rows * held.compute.itemsize / 64
        less, more = (activation_bytes(m, policy, 1, held.stream, held.compute, fused=False) for m in models.values())
        assert measured == pytest.approx((more - less) / 64, rel=0.1), policy


@pytest.mark.parametrize("family", ["LargeDiT-gqa"], indirect=True)
@pytest.mark.parametrize("policy, fused", [("none", False), ("ops", True), ("mlp", True), ("block", True)])
def test_the_estimate_has_the_repeated_heads_of_float32(policy, fused, family, kept_behind):
    """One of k for four of q, and attention PyTorch's on a GPU too; norms keep the same by kernels, but for none."""
    models = {depth: family.make(depth=depth, hidden_size=96, num_kv_heads=1, input_size=16) for depth in (1, 2)}
    for model in models.values():
        model.recompute = policy
    measured = kept_behind(models, "fp32", family.batch) - 6 * 96 * 4 / 64
    less, more = (activation_bytes(m, policy, 1, torch.float32, torch.float32, fused) for m in models.values())
    assert measured == pytest.approx((more - less) / 64, rel=0.02), policy


@pytest.mark.parametrize("family, policy", [
    ("LargeDiT-gqa-norm", "none"), ("LightningDiT-qknorm", "ops"),
    *(pytest.param("LargeDiT", policy, marks=pytest.mark.full) for policy in POLICIES[:4]),
    *(pytest.param("LightningDiT-qknorm", policy, marks=pytest.mark.full) for policy in ("none", "mlp")),
], indirect=["family"])  # fmt: skip
def test_bytes_kept_over_triton_kernels(family, policy, on_triton, kept_behind):
    held, sizes = PRECISIONS["bf16-fast"], {"hidden_size": 64, "num_heads": 2}
    sizes |= {"num_kv_heads": 1} if "num_kv_heads" in family.options else {}
    models = {depth: held.apply(family.make(depth=depth, **sizes)) for depth in (1, 2)}
    for model in models.values():
        model.recompute = policy
    estimate = activation_bytes(models[1], policy, 1, held.stream, held.compute, fused=True) / 16
    # 16 tokens a sample share its modulation (B, 6 D).
    measured = kept_behind(models, "bf16-fast", family.batch) - 6 * 64 * 2 / 16
    assert measured == pytest.approx(estimate, rel=0.04, abs=8)


COMPILED = [
    ("LargeDiT-gqa-norm", "mlp", "reference"),
    *(
        pytest.param(name, policy, backend, marks=pytest.mark.full)
        for name in ("LightningDiT-qknorm", "LargeDiT")
        for policy in ("ops", "mlp", "block")
        for backend in ("reference", "gemm")
    ),
]


@pytest.mark.parametrize("family, policy, backend", COMPILED, indirect=["family"])
def test_compiled_gradients(family, policy, backend, all_on):
    all_on(backend)
    torch._dynamo.reset()
    grads = []
    for model in (family.make(), torch.compile(family.make(), fullgraph=True, backend="aot_eager")):
        model.recompute = policy
        model(*family.batch(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("family, policy, backend", [
    ("LightningDiT-qknorm", "mlp", "gemm"),
    *(pytest.param("LargeDiT", p, b, marks=pytest.mark.full) for p in ("ops", "mlp") for b in ("reference", "triton")),
], indirect=["family"])  # fmt: skip
def test_bytes_kept_when_compiled(family, policy, backend, all_on, kept_by_compiled):
    """torch.compile may keep 1 D less: the second x of a block can be redone there too."""
    all_on(backend)
    models = {depth: family.make(depth=depth, num_heads=1, hidden_size=48) for depth in (1, 2)}
    for model in models.values():
        model.recompute = policy
    measured = kept_by_compiled(models, family.batch) / (48 * 4) - 6 / 16
    expected = activation_bytes(models[1], policy, 1, torch.float32, torch.float32) / (16 * 48 * 4)
    assert expected - 1.1 < measured < 1.1 * expected
