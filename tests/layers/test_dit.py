"""The engine's DiT equals the oracle and the official goldens; its sizes, options and errors."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditfast import reference
from ditfast.config import PRECISIONS
from ditfast.kernels._op import Op
from ditfast.layers import BLOCK_VARIANTS, DiT, DiT_models, count_parameters, forward_macs, training_flops

# Published sizes: parameters and GMACs at patch 2, 4, 8 and latent 32 (DiT, table 4; the code's counts).
PUBLISHED = {
    "S": ((32_963_360, 6.06), (32_945_024, 1.41), (33_148_160, 0.36)),
    "B": ((130_512_416, 23.01), (130_475_648, 5.57), (130_881_536, 1.42)),
    "L": ((458_102_816, 80.70), (458_053_760, 19.70), (458_594_816, 5.01)),
    "XL": ((675_129_632, 118.62), (675_074_432, 29.04), (675_683_072, 7.39)),
}
ROUNDING = 1e-5  # of the fp32 timestep embedding between CPUs, see tests/test_reference.py


@pytest.fixture
def pair(tiny, golden_state):
    """The engine's and the oracle's model with the golden weights, float64, in evaluation."""
    models = []
    for cls in (DiT, reference.DiT):
        model = cls(**tiny)
        model.load_state_dict(golden_state)
        models.append(model.double().eval())
    return models


def test_state_dict_is_the_official_one(tiny, golden_state):
    state = DiT(**tiny).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in golden_state.items()}
    assert torch.equal(state["pos_embed"], golden_state["pos_embed"])


def test_forward_equals_golden(pair, golden):
    out = pair[0](golden["in/x"].double(), golden["in/t"], golden["in/y"])
    torch.testing.assert_close(out, golden["out/forward"], rtol=0, atol=ROUNDING)


def test_guided_forward_equals_golden(pair, golden):
    x, y = golden["in/x"].double(), torch.cat([golden["in/y"], torch.full((3,), 10)])
    out = pair[0].forward_with_cfg(torch.cat([x, x]), torch.full((6,), 500), y, 4.0)
    torch.testing.assert_close(out, golden["out/forward_with_cfg_4.0_t500"], rtol=0, atol=4 * ROUNDING)


def test_guidance_on_all_channels(pair, golden):
    x, t = golden["in/x"].double(), torch.full((6,), 500)
    y = torch.cat([golden["in/y"], torch.full((3,), 10)])
    model = pair[0]
    out = model.forward_with_cfg(torch.cat([x, x]), t, y, 4.0, channels=None)
    cond, uncond = model(torch.cat([x, x]), t, y).chunk(2)
    torch.testing.assert_close(out[:3, :4], uncond[:, :4] + 4.0 * (cond - uncond)[:, :4])
    torch.testing.assert_close(out[:3, 4:], cond[:, 4:])


def test_gradients_equal_the_oracle(pair, golden):
    for model in pair:
        out = model(golden["in/x"].double(), golden["in/t"], golden["in/y"])
        (out * golden["out/forward"].cos()).sum().backward()
    expected = dict(pair[1].named_parameters())
    for name, p in pair[0].named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-9, atol=1e-11)


def test_golden_loss_gradients(pair, golden):
    from ditfast.diffusion import create_diffusion

    model = pair[0]
    kwargs = {"y": golden["in/y"]}
    terms = create_diffusion("").training_losses(
        model, golden["in/x"].double(), golden["in/t"], kwargs, noise=golden["in/noise"].double()
    )
    terms["loss"].mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {name.removeprefix("grad/"): value for name, value in golden.items() if name.startswith("grad/")}
    assert len(expected) == 21
    for name, value in expected.items():
        error = (gradients[name] - value).norm() / value.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    for patch, (parameters, gmacs) in zip((2, 4, 8), PUBLISHED[size], strict=True):
        with torch.device("meta"):
            model = DiT_models[f"DiT-{size}/{patch}"]()
        assert count_parameters(model) == parameters
        assert forward_macs(model) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_512_pixels():
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=64)
    assert count_parameters(model) == 676_014_368
    assert forward_macs(model) / 1e9 == pytest.approx(524.54, abs=0.02)
    assert training_flops(model) == 6 * forward_macs(model)


@pytest.mark.parametrize(
    "block, gmacs", [("in_context", 119.4), ("cross_attention", 137.6), ("adaln", 118.6), ("adaln_zero", 118.6)]
)
def test_block_variants_have_the_papers_compute(block, gmacs):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](block=block)
    assert forward_macs(model) / 1e9 == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_counted_macs_are_those_that_run(block, randomized, batch):
    model = randomized(block=block)
    # PyTorch's counter does not know the CPU's fused attention, so attention runs as plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch(model, 1))
    assert counter.get_total_flops() == 2 * forward_macs(model)


@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_every_parameter_of_a_variant_learns(block, randomized, batch):
    model = randomized(block=block)
    x, t, y = batch(model)
    model(x, t, y).square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_conditioning_reaches_the_output(block, randomized, batch):
    model = randomized(block=block)
    x, t, y = batch(model)
    out = model(x, t, y)
    assert not torch.allclose(out, model(x, (t + 500) % 1000, y), atol=1e-4)
    assert not torch.allclose(out, model(x, t, (y + 1) % 7), atol=1e-4)


def test_embedder_without_positions_as_officially_called(randomized, batch):
    model = randomized()
    x, *_ = batch(model)
    torch.testing.assert_close(model.x_embedder(x) + model.pos_embed, model.x_embedder(x, model.pos_embed))


def test_one_seed_gives_the_oracles_model(tiny):
    states = []
    for cls in (DiT, reference.DiT):
        torch.manual_seed(3)
        states.append(cls(**tiny).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
def test_triton_kernels_in_the_whole_model(precision, monkeypatch, randomized, batch):
    """Every op that has kernels runs on them, forward and backward, as near to float64 as PyTorch's own ops."""
    heads = {"hidden_size": 64, "num_heads": 2, "depth": 2}  # the attention kernels take head_dim from 32 on
    outcomes, choose = {}, Op.choose
    for backend in ("reference", "triton"):
        model = PRECISIONS[precision].apply(randomized(**heads))
        if backend == "triton":
            monkeypatch.setattr(
                Op, "choose", lambda op, asked, *rest: "triton" if op.kernels else choose(op, asked, *rest)
            )
        x, t, y = batch(model)
        with PRECISIONS[precision].autocast("cpu"):
            out = model(x, t, y)
        out.float().square().sum().backward()
        outcomes[backend] = torch.cat([out.flatten().float(), model.blocks[0].attn.qkv.weight.grad.flatten().float()])
    monkeypatch.undo()
    model = randomized(**heads).double()
    # Of integer timesteps the model would take the sines in float32, as PyTorch's do; the kernel's are exact.
    out = model(x.double(), t.double(), y)
    out.square().sum().backward()
    exact = torch.cat([out.flatten(), model.blocks[0].attn.qkv.weight.grad.flatten()])
    errors = {backend: (value - exact).norm() for backend, value in outcomes.items()}
    assert errors["triton"] <= 1.2 * errors["reference"]
    if precision == "fp32":  # the reference errs by 4e-6 because of those sines
        assert errors["triton"] <= 1e-6 * exact.norm()


@pytest.mark.parametrize("block", BLOCK_VARIANTS)
def test_non_square_input(block, randomized, batch):
    model = randomized(block=block, input_size=(4, 12))
    x, t, y = batch(model)
    assert model(x, t, y).shape == (5, 6, 4, 12)


def test_tokens_are_row_major(batch):
    """A change in the pixel of one patch only moves that patch's output where blocks are the identity."""
    model = DiT(input_size=(4, 8), in_channels=1, hidden_size=48, depth=1, num_heads=4, num_classes=3).eval()
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    x, t, y = batch(model, 1)
    moved = x.clone()
    moved[0, 0, 3, 5] += 1
    changed = (model(moved, t, y) != model(x, t, y))[0].any(dim=0).nonzero()
    assert changed.min(dim=0).values.tolist() == [2, 4] and changed.max(dim=0).values.tolist() == [3, 5]


def test_null_class_follows_num_classes(randomized, batch):
    model = randomized()
    x, t, y = batch(model)
    null = torch.full_like(y, 7)
    torch.testing.assert_close(model(x, t, y, torch.ones(5)), model(x, t, null))
    torch.testing.assert_close(model(x, t, y, torch.zeros(5, dtype=torch.bool)), model(x, t, y))


def test_training_drops_labels(randomized, batch):
    model = randomized(class_dropout_prob=0.999999).train()
    x, t, y = batch(model)
    torch.testing.assert_close(model(x, t, y), model.eval()(x, t, torch.full_like(y, 7)))


def test_without_dropout_there_is_no_null_class(randomized, batch):
    model = randomized(class_dropout_prob=0.0)
    x, t, y = batch(model)
    assert model.y_embedder.embedding_table.num_embeddings == 7
    with pytest.raises(ValueError, match="no null class"):
        model(x, t, y, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_official_dtypes(dtype, pair, golden):
    """fp32 stream, low-precision matrix products; as close to float64 as the oracle under the same autocast."""
    inputs = golden["in/x"], golden["in/t"], golden["in/y"]
    errors = []
    for model in pair:
        with torch.autocast("cpu", dtype=dtype):
            out = model.float()(*inputs)
        assert out.dtype is dtype
        errors.append((out.double() - golden["out/forward"]).square().mean().sqrt())
    assert errors[0] <= 1.1 * errors[1]


def test_low_precision_parameters_and_stream(randomized, batch):
    model = randomized().to(torch.bfloat16)
    model.stream_dtype = torch.bfloat16
    x, t, y = batch(model)
    streams = []
    model.blocks[2].register_forward_pre_hook(lambda module, args: streams.append(args[0].dtype))
    out = model(x.bfloat16(), t, y)
    assert out.dtype is torch.bfloat16 and streams == [torch.bfloat16]
    full = randomized()(x, t, y)
    assert (out.float() - full).norm() < 0.05 * full.norm()


def test_compiles_without_graph_breaks(randomized, batch):
    torch._dynamo.reset()
    model = randomized()
    x, t, y = batch(model)
    expected = model(x, t, y)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), expected)
    compiled(x, t, y).sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": "adaln-zero"}, "block must be one of .*adaln_zero.* got 'adaln-zero'"),
        ({"input_size": 9}, r"input_size \(9, 9\) must be divisible by patch_size 2"),
        ({"num_heads": 5}, "hidden_size 48 must be divisible by num_heads 5"),
        ({"hidden_size": 50, "num_heads": 5}, "multiple of 4"),
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"patch_size": (2, 2)}, r"patch_size must be a positive int, got \(2, 2\)"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob must be in \[0, 1\)"),
        ({"input_size": (8, 8, 8)}, r"input_size must be a positive int or \(height, width\)"),
    ],
)
def test_impossible_models(options, message, randomized):
    with pytest.raises(ValueError, match=message):
        randomized(**options)


def test_wrong_inputs(randomized, batch):
    model = randomized()
    x, t, y = batch(model)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, 8, 8\) for this model, got \(5, 3, 8, 4\)"):
        model(x[..., :4], t, y)
    with pytest.raises(ValueError, match=r"t and y must be \(B,\) = \(5,\), got \(4,\) and \(5,\)"):
        model(x, t[:4], y)
    with pytest.raises(ValueError, match=r"labels must be \(B,\) integers, got torch.float32"):
        model(x, t, y.float())
    with pytest.raises(ValueError, match="guided channels must be at least 1"):
        model.forward_with_cfg(x, t, y, 2.0, channels=0)
    with pytest.raises(ValueError, match=r"labels must be in 0..7 .* got \[8\]"):
        model(x, t, torch.tensor([0, 1, 8, 2, 3]))


@pytest.mark.parametrize("block", ["adaln_zero", "adaln"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
def test_forward_from_its_modulation_is_forward_to_the_bit(block, precision, randomized, batch):
    policy = PRECISIONS[precision]
    model = policy.apply(randomized(block=block))
    x, t, y = batch(model)
    with torch.no_grad(), policy.autocast("cpu"):
        modulation = model.modulations(t, y)
        assert modulation.shape == (5, model.modulation_width)
        assert modulation.dtype is policy.compute
        assert torch.equal(model.forward_modulated(x, modulation), model(x, t, y))


def test_modulation_drops_no_label(randomized, batch):
    model = randomized(class_dropout_prob=0.9).train()
    _, t, y = batch(model)
    assert torch.equal(model.modulations(t, y), model.eval().modulations(t, y))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda m: m.register_forward_hook(lambda *args: None), "the model has hooks"),
        (lambda m: m.blocks[1].register_forward_pre_hook(lambda *args: None), "blocks.1 has hooks"),
        (lambda m: m.t_embedder.mlp[0].register_forward_hook(lambda *args: None), "t_embedder.mlp.0 has hooks"),
        (lambda m: m.blocks[2].adaLN_modulation[1].compile(), "blocks.2.adaLN_modulation.1 has hooks"),
        (lambda m: m.blocks.__setitem__(0, Wrapped(m.blocks[0])), "blocks.0 has hooks"),
        (lambda m: setattr(m, "final_layer", Wrapped(m.final_layer)), "final_layer has hooks"),
    ],
)
def test_modulation_is_refused_where_modules_must_be_called(change, named, randomized, batch):
    model = randomized()
    assert model.modulation_obstacle() is None
    change(model)
    with pytest.raises(ValueError, match=f"cannot be computed ahead: {named}.*call the model itself"):
        model.modulations(*batch(model)[1:])


class Wrapped(nn.Module):
    """Any wrapper around a layer."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("block", ["cross_attention", "in_context"])
def test_blocks_without_adaptive_norms_have_no_modulation(block, randomized, batch):
    model = randomized(block=block)
    with pytest.raises(ValueError, match=f"blocks of kind '{block}' have no adaptive norms"):
        model.modulations(*batch(model)[1:])


def test_modulation_of_another_width_is_refused(randomized, batch):
    model = randomized()
    with pytest.raises(ValueError, match=r"modulation must be .* = \(5, 960\), got \(5, 48\)"):
        model.forward_modulated(batch(model)[0], torch.zeros(5, 48))
