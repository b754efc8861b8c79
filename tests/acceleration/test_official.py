"""The official DiT and SiT: golden outputs, what is taken over of changed ones, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast.acceleration.swap import Swapped
from ditfast.kernels import BackendError
from ditfast.layers import DiT as OwnDiT


@pytest.fixture
def parts(official):
    """Classes of the stand-in, to derive changed ones from: block, attention, MLP."""
    model = official().model
    return type(model.blocks[0]), type(model.blocks[0].attn), type(model.blocks[0].mlp)


def fused_parts(model):
    return {name for name, module in model.named_modules() if isinstance(module, Swapped)}


def test_golden_outputs(official, tiny, golden, golden_state):
    model = official(**tiny).model
    model.load_state_dict(golden_state)
    ditfast.accelerate(model)
    out = model(golden["in/x"], golden["in/t"], golden["in/y"])
    torch.testing.assert_close(out.double(), golden["out/forward"], rtol=0, atol=1e-4)


def test_everything_of_a_dit_is_taken_over(official):
    model = official(depth=1).model
    ditfast.accelerate(model)
    assert fused_parts(model) == {"t_embedder", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "final_layer"}


def test_sit_has_continuous_time(official):
    """SiT's forward is DiT's; its t in [0, 1] goes into the sinusoid as it is."""
    subject = official(learn_sigma=True)
    subject = subject._replace(args=(subject.args[0], torch.tensor([0.0, 0.3, 1.0]), subject.args[2]))
    expected = subject.run()
    ditfast.accelerate(subject.model)
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", (False, True))
def test_recomputed_blocks(official, reentrant):
    """As fast-DiT does it: every block under torch.utils.checkpoint."""
    subject = official()
    ditfast.accelerate(subject.model)
    subject.run().square().mean().backward()
    expected = [p.grad for p in subject.model.parameters()]
    for block in subject.model.blocks:
        block.forward = lambda x, c, forward=block.forward: checkpoint(forward, x, c, use_reentrant=reentrant)
    subject.model.zero_grad()
    subject.run().square().mean().backward()
    for parameter, grad in zip(subject.model.parameters(), expected, strict=True):
        # Reentrant recompute adds the gradients of what blocks share in another order.
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5 * reentrant, atol=1e-6 * reentrant)


def test_the_eps_is_the_models_own(official):
    subject = official()
    for block in subject.model.blocks:
        block.norm1.eps, block.norm2.eps = 0.1, 0.3
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    assert report.left == {}
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_is_the_models_own(official):
    subject = official()
    for block in subject.model.blocks:
        block.attn.scale = 1.0
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    assert report.left == {}
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


CHANGES = {
    "dropout in attention": ("attn", "attn_drop", nn.Dropout(0.1), "attn_drop is Dropout"),
    "dropout after attention": ("attn", "proj_drop", nn.Dropout(0.1), "proj_drop is Dropout"),
    "qk-norm": ("attn", "q_norm", nn.LayerNorm(40), "q_norm is LayerNorm"),
    "dropout in the MLP": ("mlp", "drop1", nn.Dropout(0.1), "drop1 is Dropout"),
    "erf-GELU": ("mlp", "act", nn.GELU(), "act is GELU"),
    "an MLP without bias": ("mlp", "fc2", nn.Linear(320, 80, bias=False), "fc2 is not a bare Linear with bias"),
    "an affine norm": ("", "norm2", nn.LayerNorm(80, eps=1e-6), "norm2 is not a bare LayerNorm"),
    "a norm of another kind": ("", "norm1", nn.RMSNorm(80), "norm1 is not a bare LayerNorm"),
    "another part": ("", "cross_attn", nn.Linear(80, 80), "it also has cross_attn"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_left_and_reported(official, change):
    """In one block of two: that part keeps its numbers and its class, the other block is taken over."""
    where, name, value, reason = CHANGES[change]
    subject = official()
    part = subject.block(1).get_submodule(where)
    setattr(part, name, copy.deepcopy(value))
    subject.model.train()
    torch.manual_seed(0)
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    path = ".".join(filter(None, ("blocks.1", where)))
    assert reason in report.left[path]
    assert list(report.left) == [path]
    assert "blocks.0" in fused_parts(subject.model)
    assert path not in fused_parts(subject.model)
    assert reason in str(report)
    torch.manual_seed(0)
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


def scaled_differently(self, x, c):
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_msa[:, None] * self.attn(self.norm1(x) * scale_msa[:, None] + shift_msa[:, None])
    return x + gate_mlp[:, None] * self.mlp(self.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])


def chunked_differently(self, x, c):
    gate_msa, shift_msa, scale_msa, gate_mlp, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_msa[:, None] * self.attn(self.norm1(x) * (1 + scale_msa[:, None]) + shift_msa[:, None])
    return x + gate_mlp[:, None] * self.mlp(self.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])


def dropping_a_path_in_training(self, x, c):
    out = super(type(self), self).forward(x, c)
    return x + (out - x) * (torch.rand(()) < 0.5) if self.training else out


def stopping_a_gradient(self, x, c):
    return super(type(self), self).forward(x, c.detach())


def with_another_argument(self, x, c, mask):
    return super(type(self), self).forward(x, c)


@pytest.mark.parametrize(
    ("forward", "reason"),
    (
        (scaled_differently, "own forward is another function: results differ by"),
        (chunked_differently, "own forward is another function: results differ by"),
        (dropping_a_path_in_training, "own forward is another function: results differ by"),
        (stopping_a_gradient, "own forward is another function: results differ by"),
        (with_another_argument, r"it cannot be tried on a CPU \(TypeError: .*mask"),
    ),
)
def test_a_block_of_another_formula_is_refused(official, parts, forward, reason):
    """Same names and shapes, other numbers; at DiT's initialization, where all gates are zero, nobody would notice."""
    kind = type("Block", (parts[0],), {"forward": forward})
    model = official(kind).model
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    with pytest.raises(ValueError, match=rf"no block of this DiT can be taken over: blocks\.0: .*{reason}"):
        ditfast.accelerate(model)
    assert fused_parts(model) == set()


def test_settings_of_single_blocks_are_seen(official, parts):
    """Blocks of one class may differ by an attribute: each setting is compared."""

    class Skipping(parts[0]):
        def __init__(self, *args):
            super().__init__(*args)
            self.factor = 1.0

        def forward(self, x, c):
            return self.factor * super().forward(x, c)

    model = official(Skipping).model
    model.blocks[1].factor = 0.5
    report = ditfast.accelerate(model)
    assert "another function" in report.left["blocks.1"]
    assert "blocks.0" in fused_parts(model)


def test_an_attention_that_only_looks_like_one(official, parts):
    class Causal(parts[1]):
        def forward(self, x):
            mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
            return super().forward(x, mask)

    subject = official()
    subject.model.blocks[0].attn.__class__ = Causal
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    assert "another function" in report.left["blocks.0.attn"]
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


def test_a_mask_runs_the_attentions_own_forward(official):
    subject = official()
    attention, x = subject.model.blocks[0].attn, torch.randn(2, 5, 80)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    expected = attention(x, attn_mask=mask)
    ditfast.accelerate(subject.model)
    assert torch.equal(attention(x, attn_mask=mask), expected)
    assert torch.equal(attention(x, mask), expected)


def test_conditioning_that_broadcasts(official):
    subject = official()
    block, x, c = subject.model.blocks[0], torch.randn(3, 5, 80), torch.randn(1, 80)
    expected = block(x, c)
    ditfast.accelerate(subject.model)
    torch.testing.assert_close(block(x, c), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ("attn", "mlp"))
def test_a_branch_widens_the_stream(official, part):
    """A bfloat16 stream plus a float32 branch is float32."""

    class Wide(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            out = self.inner(x)
            return out.float() if out.dtype == torch.bfloat16 else out

    subject = official()
    block, x, c = subject.block(), torch.randn(2, 5, 80, dtype=torch.bfloat16), torch.randn(2, 80)
    setattr(block, part, Wide(getattr(block, part)))
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x, c)
        report = ditfast.accelerate(subject.model)
        fused = block(x, c)
    assert report.left == {}
    assert fused.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(fused, expected, rtol=0.05, atol=0.05)


def test_a_forward_replaced_on_the_module_is_kept(official):
    subject = official()
    forward = subject.model.blocks[0].forward
    subject.model.blocks[0].forward = lambda x, c: 2 * forward(x, c)
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    assert report.left == {"blocks.0": "its forward was replaced on the module itself"}
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    (
        (
            nn.Linear(4, 4),
            "no block of this Linear can be taken over; supported are the official DiT or SiT, .*diffusers",
        ),
        (nn.TransformerEncoderLayer(8, 2), "no block of this TransformerEncoderLayer can be taken over; supported are"),
        (
            OwnDiT(8, 2, 4, 32, 1, 2),
            "this DiT can be taken over: it is made of ditfast's layers, which are fused already",
        ),
        ({"model": 1}, "model is a dict, expected a torch.nn.Module: the official DiT or SiT"),
        (type("Pipeline", (), {"transformer": 1})(), "model is a Pipeline, .*; pass its `transformer`"),
    ),
    ids=("Linear", "encoder", "ditfast", "dict", "pipeline"),
)
def test_unknown_models(model, message):
    with pytest.raises(ValueError, match=message):
        ditfast.accelerate(model)


def test_restore_wants_a_module():
    with pytest.raises(ValueError, match=r"restore: model is a str, expected a torch\.nn\.Module"):
        ditfast.restore("model")


@pytest.mark.parametrize(
    ("backend", "kind", "message"),
    (
        (
            {"layernorm": "triton"},
            ValueError,
            "backend names layernorm; ops of accelerated models are adaln_modulate, ",
        ),
        (None, ValueError, r"accelerate: backend is None, expected a name such as 'auto', or {op: name}"),
        ("cuda", BackendError, "backend 'cuda' is not one of 'auto'"),
        ({"gate_residual": "sdpa"}, BackendError, "gate_residual: backend 'sdpa' is not one of 'auto', 'triton', "),
    ),
)
def test_backends_that_do_not_exist(official, backend, kind, message):
    model = official().model
    with pytest.raises(kind, match=message):
        ditfast.accelerate(model, backend=backend)
    assert fused_parts(model) == set()
    ditfast.accelerate(model)
    before = fused_parts(model)
    with pytest.raises(kind, match=message):
        ditfast.accelerate(model, backend=backend)
    assert fused_parts(model) == before != set()
