"""The oracle of every family, in every recipe, computes what ditfast's model does, by ditfast's names."""

from dataclasses import replace

import pytest
import torch

from bench import oracles
from bench.oracles import Recipe, build_reference, ditfast_names
from bench.training import TINY, fill_zeros, model_config, random_batch
from ditfast import reference
from ditfast.build import build_model
from ditfast.config import PRECISIONS, ModelConfig
from ditfast.layers import NormForm

CPU = torch.device("cpu")
LIGHTNING, LARGE = (replace(model_config(name, 64), depth=1) for name in ("tiny LightningDiT-XL/1", "LargeDiT-tiny/2"))
MODELS = {
    "DiT": replace(TINY, depth=1),
    "SiT": replace(model_config("tiny SiT-S/2", 64), depth=1),
    "LightningDiT": LIGHTNING,
    "LightningDiT-options": replace(
        LIGHTNING, mlp="gelu", block="adaln_zero_no_shift", qk_norm=NormForm("rms", weight=True), position=("sincos",)
    ),
    "LargeDiT": LARGE,
    "LargeDiT-plain": replace(LARGE, kv_heads=None, qk_norm=None),
}


def weights_of(config: ModelConfig) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = build_model(config)
    fill_zeros(model.parameters())
    return model, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(sdpa=True, checkpointed=True)], ids=["oracle", "fast-DiT"])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_those_of_ditfasts_model(name, recipe):
    config = MODELS[name]
    ours, weights = weights_of(config)
    peer = build_reference(config, weights, recipe)
    peer.t_embedder.__class__ = reference.TimestepEmbedder  # with angles in fp32, as ditfast's and the official ones
    x, y, t, *_ = random_batch(config, 3, CPU)
    inputs = x.double().requires_grad_(), t, y
    outs = [model.double().eval()(*inputs) for model in (ours, peer)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-10)
    for out in outs:
        out.square().sum().backward()
    expected = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    found = ditfast_names(config, {name: p.grad for name, p in peer.named_parameters() if p.requires_grad})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["DiT", "LightningDiT", "LargeDiT"])
def test_a_recipe_changes_every_block_and_attention(name, monkeypatch):
    """So that a peer is what its name says: one checkpoint and one of torch's attention in each block."""
    calls = []
    for place, called in ((oracles, "checkpoint"), (oracles.F, "scaled_dot_product_attention")):
        kept = getattr(place, called)
        monkeypatch.setattr(place, called, lambda *a, f=kept, n=called, **k: calls.append(n) or f(*a, **k))
    config = replace(MODELS[name], depth=2)
    peer = build_reference(config, weights_of(config)[1], Recipe(sdpa=True, checkpointed=True))
    x, y, t, *_ = random_batch(config, 2, CPU)
    peer(x, t, y)
    assert sorted(calls) == 2 * ["checkpoint"] + 2 * ["scaled_dot_product_attention"]


@pytest.mark.parametrize("name", ["DiT", "LightningDiT", "LargeDiT"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
def test_the_residual_stream_has_the_policys_dtype(name, precision):
    config, held, seen = MODELS[name], PRECISIONS[precision], []
    peer = build_reference(config, weights_of(config)[1], Recipe(sdpa=True)).to(held.params)
    blocks = next(module for module in peer.children() if isinstance(module, torch.nn.ModuleList))
    blocks[0].register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    x, y, t, *_ = random_batch(config, 2, CPU)
    with held.autocast(CPU):
        peer(x.to(held.params), t, y)
    assert seen == 2 * [held.stream]


@pytest.mark.parametrize("odd", [{"input_size": (8, 16)}, {"block": "in_context"}, {"mlp": "swiglu"}])
def test_a_model_that_the_reference_does_not_have_is_refused(odd):
    _, weights = weights_of(TINY)
    with pytest.raises(
        ValueError, match="square inputs and the architectures of DiT, SiT, LightningDiT, LargeDiT, got"
    ):
        build_reference(replace(TINY, **odd), weights)


def test_weights_of_another_model_are_refused():
    _, weights = weights_of(LARGE)
    for wrong in (
        {"blocks.0.mlp.w12.weight": weights["blocks.0.mlp.w3.weight"]},
        {"odd": weights["x_embedder.proj.bias"]},
    ):
        with pytest.raises(RuntimeError, match="Error"):
            build_reference(LARGE, weights | wrong)
