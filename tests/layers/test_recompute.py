"""Recompute policies: the bytes that they keep, equal gradients, and modules that are not what they were."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast.config import PRECISIONS
from ditfast.layers import BLOCK_VARIANTS, Architecture, DiT, DiTBlock, activation_bytes, block_bytes
from ditfast.layers.replay import Replays

POLICIES = ("none", "ops", "mlp", "block", "block:2")
SIZES = [{"hidden_size": 64, "input_size": 32}, {"hidden_size": 96, "input_size": 32, "mlp_ratio": 3.0}]


def build(policy: str = "none", precision: str = "fp32", **options) -> DiT:
    """A small model none of whose weights is zero."""
    torch.manual_seed(0)
    model = DiT(**{"input_size": 8, "in_channels": 1, "hidden_size": 48, "num_heads": 4, "num_classes": 7} | options)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    model = PRECISIONS[precision].apply(model).eval()
    model.recompute = policy
    return model


def batch(model: DiT, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.in_channels, *model.x_embedder.img_size, generator=generator)
    return x, torch.arange(n) * 100, torch.arange(n) % 7


def gradients(model: DiT, precision: str = "fp32", forward=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with PRECISIONS[precision].autocast("cpu"):
        out = (model if forward is None else forward)(*batch(model))
    out.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.fixture
def kept_per_token(kept_behind):
    """kept_per_token(policy, precision, **options): bytes per token and layer, as a forward leaves them behind."""

    def measure(policy: str, precision: str, **options) -> float:
        models = {depth: build(policy, precision, depth=depth, **options) for depth in (2, 4)}
        return kept_behind(models, precision, batch)

    return measure


TABLE = {"none": 20, "ops": 11, "mlp": 7, "block": 1, "block:2": 6}  # of width D, the stream in bf16


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_kept_are_those_of_the_table(policy, kept_per_token):
    """performance.md's table of activation memory, per policy, in bf16."""
    assert kept_per_token(policy, "bf16-fast", **SIZES[0]) == pytest.approx(TABLE[policy] * 64 * 2, rel=0.1)


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_the_estimate_is_what_is_kept(block, precision, size, kept_per_token):
    options = SIZES[size] | {"block": block}
    for policy in POLICIES:
        held = PRECISIONS[precision]
        estimates = [
            activation_bytes(build(depth=depth, **options), policy, 1, held.stream, held.compute, fused=False)
            for depth in (2, 4)
        ]
        measured = kept_per_token(policy, precision, **options) * 2 * (options["input_size"] // 2) ** 2
        assert measured == pytest.approx(estimates[1] - estimates[0], rel=0.1), policy


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_gradients_are_the_same_bits_under_every_policy(block, precision):
    expected = gradients(build("none", precision, depth=3, block=block), precision)
    for policy in POLICIES[1:]:
        assert_same_bits(gradients(build(policy, precision, depth=3, block=block), precision), expected)


def _sum_of_two(model: DiT, others: tuple[torch.Tensor, ...], *inputs: torch.Tensor) -> torch.Tensor:
    return model(*inputs) + model(*others)


@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_gradients_of_two_forwards_under_one_autocast(block):
    """Autocast keeps a weight's copy for the second forward; all policies add the two gradients in one dtype."""
    results = []
    for policy in POLICIES:
        model = build(policy, depth=2, block=block)
        x, t, y = batch(model)
        results.append(gradients(model, "bf16", forward=partial(_sum_of_two, model, (x.flip(0), t, y))))
    for ours in results[1:]:
        assert_same_bits(ours, results[0])


@pytest.mark.parametrize(
    "policy", ["ops", *(pytest.param(p, marks=pytest.mark.full) for p in ("none", "mlp", "block"))]
)
def test_bytes_kept_over_triton_kernels(policy, on_triton, kept_per_token):
    held = PRECISIONS["bf16-fast"]
    estimate = block_bytes(Architecture(hidden_size=64), policy, held.stream, held.compute, fused=True)
    measured = kept_per_token(policy, "bf16-fast", hidden_size=64, input_size=8, num_heads=2)
    # 16 tokens a sample share its modulation (B, 6 D).
    assert measured - 6 * 64 * 2 / 16 == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_gradients_over_triton_kernels(precision, on_triton):
    def of(policy):
        return gradients(build(policy, precision, depth=2, hidden_size=32, num_heads=1), precision)

    expected = of("none")
    for policy in ("ops", "mlp"):
        assert_same_bits(of(policy), expected)
    # A block that settles its residual adds two rounded terms where the shared kernel adds them before rounding.
    settled = of("block")
    for name, value in expected.items():
        assert (settled[name] - value).norm() <= (1e-5 if precision == "fp32" else 2e-2) * value.norm(), name


@pytest.mark.parametrize("block, policy", [
    pytest.param(b, p, marks=[] if (b, p) in (("adaln_zero", "mlp"), ("cross_attention", "ops")) else pytest.mark.full)
    for b in BLOCK_VARIANTS for p in POLICIES[1:]
])  # fmt: skip
def test_compiled_gradients(block, policy):
    torch._dynamo.reset()
    expected = gradients(build(depth=2, block=block))
    model = build(policy, depth=2, block=block)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(model, forward=compiled), expected)


@pytest.fixture
def kept_compiled(kept_by_compiled):
    """kept_compiled(policy, width): per token and layer in units of D, without the modulation (B, 6 D) of 16 tokens."""

    def measure(policy: str, width: int = 48, **options) -> float:
        models = {depth: build(policy, depth=depth, hidden_size=width, **options) for depth in (1, 2)}
        return kept_by_compiled(models, batch) / (width * 4) - 6 / 16

    return measure


@pytest.mark.parametrize("policy", ["mlp", *(pytest.param(p, marks=pytest.mark.full) for p in ("ops", "block"))])
def test_bytes_kept_when_compiled(policy, kept_compiled):
    assert kept_compiled(policy) == pytest.approx(TABLE[policy], rel=0.1)


@pytest.mark.parametrize("policy", ["ops", *(pytest.param(p, marks=pytest.mark.full) for p in ("mlp", "block"))])
def test_bytes_kept_when_compiled_over_triton_kernels(policy, on_triton, kept_compiled):
    """torch.compile may keep 1 D less: the second x of a block, of an op with two results, can be redone there too."""
    measured = kept_compiled(policy, 32, num_heads=1)
    assert TABLE[policy] - 1.1 < measured < 1.1 * TABLE[policy]


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_by_inductor(policy):
    torch._dynamo.reset()
    expected = gradients(build(depth=2))
    model = build(policy, depth=2)
    ours = gradients(model, forward=torch.compile(model, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


class LoRA(nn.Module):
    """A Linear with dropout and a low-rank addition, as fine-tuning libraries put in its place."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(0.5)
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.dropout(self.down(x)))


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_replaced_modules_have_their_gradients(name):
    """Random numbers are drawn once, or again from the same state; frozen weights have no gradient."""
    results = []
    for policy in POLICIES:
        model = build(depth=3).requires_grad_(False).train()
        torch.manual_seed(3)
        for block in model.blocks:
            block.set_submodule(name, LoRA(block.get_submodule(name)))
        model.recompute = policy
        torch.manual_seed(4)
        results.append(gradients(model))
        assert len(results[0]) == 6
    for ours in results[1:]:
        assert_same_bits(ours, results[0])


class Around(nn.Module):
    """A wrapper that adds a trained scale to what it wraps, and has none of its attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.scale = module, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.module(x)


REPLACED = {
    "wrapped attention": ("attn", Around),
    "wrapped MLP": ("mlp", Around),
    "another MLP": ("mlp", lambda mlp: nn.Sequential(mlp.fc1, nn.ReLU(), mlp.fc2)),
    "MLP without weights": ("mlp", lambda mlp: nn.Tanh()),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
@pytest.mark.parametrize("name, replace", REPLACED.values(), ids=REPLACED)
def test_other_modules_for_all_of_attention_or_mlp(name, replace, precision):
    results = []
    for policy in POLICIES:
        model = build(precision=precision, depth=3)
        for block in model.blocks:
            block.set_submodule(name, replace(block.get_submodule(name)))
        model.to(model.x_embedder.proj.weight.dtype).recompute = policy
        results.append(gradients(model, precision))
    for ours in results[1:]:
        assert_same_bits(ours, results[0])


@pytest.mark.parametrize("name", ["", "attn", "mlp", "attn.qkv", "mlp.fc1"])
def test_hooks_run_once_where_ops_are_replayed(name):
    expected = gradients(build(depth=2))
    for policy in ("ops", "mlp"):
        model, calls = build(policy, depth=2), []
        module = model.blocks[1].get_submodule(name)
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert_same_bits(gradients(model), expected)
        assert calls == [1]


def test_a_wrapper_around_a_block_keeps_its_policy():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

    model = build(depth=2)
    expected = gradients(model)
    wrapping.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, DiTBlock))
    for policy in POLICIES:
        model.recompute = policy
        ours = {name.replace("._checkpoint_wrapped_module", ""): value for name, value in gradients(model).items()}
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("trainable", ["blocks.1.adaLN_modulation", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "final"])
def test_partly_frozen_models(trainable):
    results = []
    for policy in POLICIES:
        model = build(policy, depth=2)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(trainable))
        results.append(gradients(model))
    for ours in results[1:]:
        assert_same_bits(ours, results[0])


@pytest.mark.parametrize("policy", ["ops", "mlp"])
def test_backward_twice_and_in_parts(policy):
    results = []
    for policy_ in ("none", policy):
        model = build(policy_, depth=2)
        weights = [model.blocks[0].attn.qkv.weight, model.blocks[1].mlp.fc1.weight, model.blocks[0].mlp.fc2.weight]
        loss = model(*batch(model)).square().sum()
        parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for weight in weights]
        results.append([*parts, *torch.autograd.grad(loss, weights, retain_graph=True)])
        results[-1] += torch.autograd.grad(loss, weights)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_sampling_runs_as_without_a_policy(policy):
    """Without gradients the same operations are called, in the same order."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[-1].append(func)
            return func(*args, **(kwargs or {}))

    calls = []
    for each in ("none", policy):
        calls.append([])
        model = build(each, depth=2)
        with torch.no_grad(), Calls():
            model(*batch(model))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_kept_once_the_output_is_gone(policy, storages):
    """Neither a leak nor, but for torch's own checkpoint, a cycle that the garbage collector would have to find."""
    model = build(policy, depth=2)
    gc.collect()
    gc.disable()
    try:
        with storages:
            model(*batch(model))
        if "block" in policy:
            gc.collect()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        assert storages.alive(without=weights) == 0
    finally:
        gc.enable()


def test_memory_is_freed_as_the_backward_goes(storages):
    model = build("ops", depth=4)
    with storages:
        out = model(*batch(model)).sum()
        before, left = storages.alive(), []
        model.blocks[0].attn.qkv.weight.register_hook(lambda grad: left.append(storages.alive()))
        out.backward()
    assert left[0] < 0.6 * before + sum(p.numel() * 4 for p in model.parameters())


class TestReplay:
    """The mechanism by itself: what is dropped, and when it must not be."""

    def test_a_result_written_to_is_kept(self):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        with (replays := Replays()):
            y = replays.call(torch.sin, x, drop=(0,))
            with torch.no_grad():
                y.mul_(2)
            out = y @ w
        (dw,) = torch.autograd.grad(out.sum(), w)
        torch.testing.assert_close(dw, (2 * torch.sin(x)).T @ torch.ones(3, 4))

    @pytest.mark.parametrize("drop", [(0,), ()])
    def test_what_is_kept_and_written_to_is_an_error(self, drop):
        x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
        with (replays := Replays()):
            y = replays.call(torch.sin, x, drop=drop)
            out = y @ w
        (x if drop else y).add_(1)
        with pytest.raises(RuntimeError, match="written to in place"):
            out.sum().backward()

    def test_a_part_of_a_result_is_dropped_with_it(self):
        x, w = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
        with (replays := Replays()):
            out = replays.call(torch.sin, x, drop=(0,))[2:] * w
        (dw,) = torch.autograd.grad(out.sum(), w)
        assert torch.equal(dw, torch.sin(x)[2:])

    def test_a_transposed_result_is_dropped_with_it(self):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        with (replays := Replays()):
            out = replays.call(torch.sin, x, drop=(0,)).T * w
        (dw,) = torch.autograd.grad(out.sum(), w)
        assert torch.equal(dw, torch.sin(x).T)

    def test_a_result_that_is_part_of_another_is_kept(self):
        """Its storage holds what may not be there the next time."""
        x, w, whole = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True), []

        def top(x):
            whole.append(torch.sin(x))
            return whole[0][:2] if len(whole) == 1 else whole[-1][:2].clone()

        with (replays := Replays()):
            part = replays.call(top, x, drop=(0,))
            out = part * w + whole[0][2:] * w
        (dw,) = torch.autograd.grad(out.sum(), w)
        assert torch.equal(dw, torch.sin(x)[:2] + torch.sin(x)[2:])

    def test_what_is_dropped_is_gone(self):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        with (replays := Replays()):
            y = replays.call(torch.sin, x, drop=(0,))
            out, reference = y @ w, weakref.ref(y)
            storage = StorageWeakRef(y.untyped_storage())
            del y
        assert reference() is None and storage.expired() and out.requires_grad

    def test_it_runs_once_a_backward(self):
        x, w, calls = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True), []
        with (replays := Replays()):
            y = replays.call(lambda x: [calls.append(1), torch.sin(x)][1], x, drop=(0,))
            out = (y @ w).sum() + (y @ w.T).sum()
        out.backward()
        assert calls == [1, 1]

    def test_a_second_derivative_is_refused(self):
        x = torch.randn(3, requires_grad=True)
        with (replays := Replays()):
            y = replays.call(torch.sin, x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("policy", ["blocks", "op", "block:0", "block:", "block:x", "ops:2", "none:1", "", None, 3])
def test_unknown_policies(policy):
    message = f"recompute must be one of none, ops, mlp, block, or block:k for every k-th block, got {policy!r}"
    with pytest.raises(ValueError, match=message):
        build(policy, depth=1)


def test_every_kth_block():
    model = build("block:3", depth=7)
    assert model.recompute == "block:3"
    assert [block.recompute for block in model.blocks] == ["ops", "ops", "block", "ops", "ops", "block", "ops"]
    assert [block.recompute for block in copy.deepcopy(model).blocks] == [block.recompute for block in model.blocks]
    with pytest.raises(ValueError, match="recompute of a block must be one of none, ops, mlp, block, got 'block:3'"):
        model.blocks[0].recompute = "block:3"
