"""diffusers' DiTTransformer2DModel: its own numerics, its pipeline, its switches."""

import copy

import pytest
import torch
from torch import nn

import ditfast
from ditfast.acceleration.swap import Swapped
from ditfast.kernels import _triton

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")


def gradients(subject):
    torch.manual_seed(0)
    subject.model.zero_grad()
    subject.run().square().mean().backward()
    return [p.grad for p in subject.model.parameters() if p.grad is not None]


def test_everything_of_a_block_is_taken_over(diffusers_dit):
    model = diffusers_dit(num_layers=1).model
    ditfast.accelerate(model)
    block = "transformer_blocks.0"
    assert {name for name, module in model.named_modules() if isinstance(module, Swapped)} == {
        "pos_embed", block, f"{block}.norm1", f"{block}.norm1.emb.time_proj", f"{block}.attn1", f"{block}.ff",
    }  # fmt: skip


def test_the_norms_have_their_own_eps(diffusers_dit):
    """1e-6 before attention and 1e-5 before the MLP, which shows where the stream is small."""
    subject = diffusers_dit()
    block, x = subject.block(), 1e-3 * torch.randn(3, 16, 80)
    nn.init.zeros_(block.attn1.to_out[0].weight)
    nn.init.zeros_(block.attn1.to_out[0].bias)
    expected = block(x, **subject.kwargs)
    block.norm3.eps = 1e-6
    official_eps = block(x, **subject.kwargs)
    block.norm3.eps = 1e-5
    ditfast.accelerate(subject.model)
    fused = block(x, **subject.kwargs)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    assert (official_eps - expected).abs().max() > 1e-1


def test_the_sinusoid_divides_by_127(diffusers_dit):
    subject = diffusers_dit()
    sinusoid, t = subject.block().norm1.emb.time_proj, torch.tensor([0, 1, 500, 999])
    ditfast.accelerate(subject.model)
    angles = t[:, None].double() * 10000 ** (-torch.arange(128, dtype=torch.float64) / 127)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(sinusoid(t).double(), expected, rtol=0, atol=1e-4)
    assert sinusoid(t).dtype == torch.float32


def pipeline(model):
    """DiTPipeline around the model, with a tiny VAE."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    pipe = diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "DPMSolverMultistepScheduler"))
def test_sampling_through_its_pipeline(diffusers_dit, scheduler):
    model = diffusers_dit(num_embeds_ada_norm=1000).model
    pipe = pipeline(model)
    pipe.scheduler = getattr(diffusers, scheduler)()

    def sample():
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 7], guidance_scale=4.0, generator=generator, num_inference_steps=6, output_type="np").images

    expected = torch.tensor(sample())
    report = ditfast.accelerate(pipe.transformer)
    images = torch.tensor(sample())
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    assert report.check(torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=torch.tensor([3, 4]))
    ditfast.restore(model)
    assert torch.equal(torch.tensor(sample()), expected)


def test_labels_are_dropped_as_before(diffusers_dit):
    """Every block draws for itself, in the same order, with and without fused blocks."""
    subject = diffusers_dit()
    subject.model.train()
    for block in subject.model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.5
    expected = gradients(subject)
    ditfast.accelerate(subject.model)
    for fused, truth in zip(gradients(subject), expected, strict=True):
        torch.testing.assert_close(fused, truth, rtol=1e-3, atol=1e-5)


def test_its_gradient_checkpointing(diffusers_dit):
    subject = diffusers_dit()
    subject.model.train()
    ditfast.accelerate(subject.model)
    expected = gradients(subject)
    subject.model.enable_gradient_checkpointing()
    assert subject.model.is_gradient_checkpointing
    for fused, truth in zip(gradients(subject), expected, strict=True):
        assert torch.equal(fused, truth)


def test_half_precision_weights(diffusers_dit):
    subject = diffusers_dit()
    subject.model.to(torch.bfloat16)
    expected = subject.run()
    report = ditfast.accelerate(subject.model)
    assert report.dtype == torch.bfloat16
    assert subject.run().dtype == torch.bfloat16
    truth = subject.run(copy.deepcopy(subject.model).float())
    assert (subject.run() - truth).norm() < 1.1 * (expected - truth).norm()


def test_kernels_at_the_tokens_and_heads_of_xl(diffusers_dit):
    """What a GPU would launch, forward and backward, seen on meta: head_dim 72, 256 tokens, bfloat16."""
    model = diffusers_dit(num_layers=1, num_attention_heads=2, attention_head_dim=72, sample_size=32).model
    model.to("meta", torch.bfloat16)
    ops = ("adaln_modulate", "attention", "gate_residual_adaln_modulate", "gate_residual")
    ditfast.accelerate(model, backend=dict.fromkeys(ops, "triton"))
    x, t = (
        torch.empty(2, 4, 32, 32, dtype=torch.bfloat16, device="meta"),
        torch.zeros(2, dtype=torch.long, device="meta"),
    )
    with _triton.recording() as launches:
        out = model(x, timestep=t, class_labels=t).sample
        forward = len(launches)
        out.sum().backward()
    names = [launch.kernel.__name__ for launch in launches]
    kernels = ("norm", "attention", "norm", "gate_residual")  # of the ops in turn
    assert names[:forward] == [f"_{kernel}_fwd_kernel" for kernel in kernels]
    assert out.dtype == torch.bfloat16
    for kernel in kernels:
        assert any(name.startswith(f"_{kernel}") and "_bwd" in name for name in names[forward:]), kernel


def test_saving_and_loading(diffusers_dit, tmp_path):
    subject = diffusers_dit()
    ditfast.accelerate(subject.model)
    subject.model.save_pretrained(tmp_path)
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, Swapped) for module in loaded.modules())
    torch.testing.assert_close(subject.run(loaded), subject.run(), rtol=1e-4, atol=1e-4)


def another_processor(block):
    processor = diffusers.models.attention_processor
    block.attn1.set_processor(processor.SlicedAttnProcessor(1))


def fused_projections(block):
    block.attn1.set_processor(diffusers.models.attention_processor.FusedAttnProcessor2_0())
    block.attn1.fuse_projections()


def chunked_feed_forward(block):
    block.set_chunk_feed_forward(8, dim=1)


def another_activation(block):
    block.ff.net[0].approximate = "none"


def dropout(block):
    block.ff.net[1].p = 0.1


CHANGES = {
    another_processor: ("attn1", "its processor is SlicedAttnProcessor"),
    fused_projections: ("attn1", "its processor is FusedAttnProcessor2_0"),
    chunked_feed_forward: ("", "its feed-forward is chunked"),
    another_activation: ("ff", "its activation is not a bare tanh-GELU"),
    dropout: ("ff", "1 is Dropout"),
}


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("change", CHANGES)
def test_its_switches(diffusers_dit, change, when):
    """Thrown before, the part is left and reported; after, it runs its own forward."""
    plain, subject = diffusers_dit(), diffusers_dit()
    change(plain.block(1))
    if when == "after":
        report = ditfast.accelerate(subject.model)
        change(subject.block(1))
        with pytest.raises(AssertionError, match=r"transformer_blocks\.1.* ran no op|it also has"):
            report.check(*subject.args, **subject.kwargs)
    else:
        change(subject.block(1))
        where, reason = CHANGES[change]
        report = ditfast.accelerate(subject.model)
        path = ".".join(filter(None, ("transformer_blocks.1", where)))
        assert reason in report.left[path] or "it also has to_qkv" in report.left[path]
        assert list(report.left) == [path]
    torch.testing.assert_close(subject.run(), plain.run(), rtol=1e-4, atol=1e-4)


def test_a_mask_runs_the_blocks_own_forward(diffusers_dit):
    subject = diffusers_dit()
    block, x = subject.block(), torch.randn(3, 16, 80)
    mask = torch.full((3, 1, 16), 0.0)
    mask[..., 8:] = -10000.0
    expected = block(x, attention_mask=mask, **subject.kwargs)
    ditfast.accelerate(subject.model)
    torch.testing.assert_close(block(x, attention_mask=mask, **subject.kwargs), expected, rtol=1e-4, atol=1e-4)
    assert (block(x, **subject.kwargs) - expected).abs().max() > 1e-2


def test_inputs_of_another_size(diffusers_dit):
    """Its positions are then made anew; the blocks stay fused."""
    subject = diffusers_dit()
    subject = subject._replace(args=(torch.randn(3, 4, 12, 12),))
    expected = subject.run()
    ditfast.accelerate(subject.model)
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)


def test_its_unet_is_no_dit():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no block of this UNet2DConditionModel can be taken over; supported are"):
        ditfast.accelerate(unet)


def test_a_pipeline_is_not_its_model(diffusers_dit):
    with pytest.raises(ValueError, match="model is a DiTPipeline, .*; pass its `transformer`"):
        ditfast.accelerate(pipeline(diffusers_dit().model))
