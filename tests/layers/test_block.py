"""DiT blocks equal their equations, in the official form and the pending one, whatever is hooked or wrapped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditfast.layers import DiT, DiTBlock
from ditfast.layers.block import settle


def test_adaln_zero_starts_as_the_identity(batch):
    model = DiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=7)
    x, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[0](x, c), x)
    assert not model.forward(*batch(model, 2)).any()


@pytest.mark.parametrize("gated", [True, False])
def test_pending_form_equals_the_official_form(gated, randomized):
    model = randomized(block="adaln_zero" if gated else "adaln")
    x, c = torch.randn(3, 16, 48), torch.randn(3, 48)
    official, pending = x, (x, None, None)
    for block in model.blocks:
        official = block(official, c)
        pending = block.forward_pending(pending, block.adaLN_modulation(c))
    torch.testing.assert_close(settle(*pending), official)
    final = model.final_layer
    torch.testing.assert_close(final.forward_pending(pending, final.adaLN_modulation(c)), final(official, c))


def test_hooks_see_the_official_block(randomized, batch):
    model = randomized()
    x, t, y = batch(model)
    plain = model(x, t, y)
    seen = {}
    handles = [
        model.blocks[1].register_forward_hook(lambda module, args, out: seen.update(block=(args, out))),
        model.final_layer.register_forward_pre_hook(lambda module, args: seen.update(final=args)),
    ]
    torch.testing.assert_close(model(x, t, y), plain)
    (stream, c), out = seen["block"]
    torch.testing.assert_close(model.blocks[1](stream, c), out)
    assert [v.shape for v in seen["final"]] == [(5, 16, 48), (5, 48)]
    for handle in handles:
        handle.remove()
    handle = model.blocks[0].register_forward_hook(lambda module, args, out: out + 1.0)
    assert not torch.allclose(model(x, t, y), plain)
    handle.remove()


def calls_of(module: nn.Module, monkeypatch) -> list:
    """What the module's own forward is called with from now on."""
    seen, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args: (seen.append(args), forward(*args))[1])
    return seen


@pytest.mark.parametrize(
    "name", ["blocks.1", "final_layer", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "x_embedder.proj", "blocks.1.attn.qkv"]
)
def test_a_changed_module_is_called(name, monkeypatch, randomized, batch):
    """A patched forward stands for all that replaces or wraps a module: LoRA, quantization, recompute wrappers."""
    model = randomized()
    inputs = batch(model)
    plain = model(*inputs)
    seen = calls_of(model.get_submodule(name), monkeypatch)
    torch.testing.assert_close(model(*inputs), plain)
    assert len(seen) == 1


def test_a_recompute_wrapper_recomputes(randomized, batch):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

    model = randomized()
    expected = torch.autograd.grad(model(*batch(model)).sum(), model.blocks[0].mlp.fc1.weight)
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    wrapping.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, DiTBlock))
    gradient = torch.autograd.grad(model(*batch(model)).sum(), model.blocks[0].mlp.fc1.weight)
    torch.testing.assert_close(gradient, expected)
    assert len(calls) == 2


def attend(module: nn.Module, q: torch.Tensor, kv: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention by the equation; the rows of a packed weight are q | k | v."""
    width = q.shape[-1]
    if hasattr(module, "qkv"):
        wq, wk, wv = module.qkv.weight.chunk(3)
        bq, bk, bv = module.qkv.bias.chunk(3)
    else:
        wq, (wk, wv) = module.q.weight, module.kv.weight.chunk(2)
        bq, (bk, bv) = module.q.bias, module.kv.bias.chunk(2)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in ((q, wq, bq), (kv, wk, bk), (kv, wv, bv))
    )
    weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


def feed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.fc2(F.gelu(module.fc1(x), approximate="tanh"))


def plain_adaln(block, x, c):
    norm = nn.LayerNorm(48, eps=1e-6, elementwise_affine=False)
    shift1, scale1, shift2, scale2 = block.adaLN_modulation[1](F.silu(c))[:, None].chunk(4, dim=-1)
    y = norm(x) * (1 + scale1) + shift1
    x = x + attend(block.attn, y, y, 4)
    return x + feed(block.mlp, norm(x) * (1 + scale2) + shift2)


def plain_in_context(block, x, context):
    y = block.norm1(x)
    x = x + attend(block.attn, y, y, 4)
    return x + feed(block.mlp, block.norm2(x))


def plain_cross_attention(block, x, context):
    y = block.norm1(x)
    x = x + attend(block.attn, y, y, 4)
    x = x + attend(block.cross_attn, block.norm2(x), context, 4)
    return x + feed(block.mlp, block.norm3(x))


@pytest.mark.parametrize(
    "variant, plain",
    [("adaln", plain_adaln), ("in_context", plain_in_context), ("cross_attention", plain_cross_attention)],
)
def test_variants_equal_their_equations(variant, plain, randomized):
    block = randomized(block=variant).blocks[1]
    x, c = torch.randn(3, 18, 48), torch.randn(3, 48) if variant == "adaln" else torch.randn(3, 2, 48)
    torch.testing.assert_close(block(x, c), plain(block, x, c))


def test_in_context_tokens_are_the_embeddings_and_leave_again(randomized, batch):
    model = randomized(block="in_context")
    x, t, y = batch(model)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, t, y)
    expected = torch.stack([model.t_embedder(t), model.y_embedder(y, False)], dim=1)
    torch.testing.assert_close(seen[0][:, 16:], expected)
    assert seen[1].shape == (5, 16, 48)
