"""The parts of diffusers' DiTTransformer2DModel on ditfast's ops. diffusers itself is not imported.

Its numbers are kept where they differ from the official DiT's: every block embeds timestep and label itself, the
sinusoid's exponent divides by half - 1, and the norm before the MLP has its own eps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.acceleration.official import second_half
from ditfast.acceleration.swap import Form, compute_dtype, idle_problem, inputs_of, linear_problem, norm_problem, on
from ditfast.layers.plain import is_plain

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class BlockForm(Form):
    """BasicTransformerBlock with norm_type "ada_norm_zero" and self-attention alone."""

    what = "block"
    ops = ("gate_residual_adaln_modulate", "gate_residual")
    required = frozenset({"norm1", "attn1", "norm3", "ff"})
    is_block = True

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        return super().is_kind(module) and AdaLayerNormZeroForm.is_kind(module.norm1)

    @staticmethod
    def unfit(module: Any) -> str | None:
        if module.norm_type != "ada_norm_zero" or module.attn2 is not None or module.pos_embed is not None:
            return "it is not a block of adaLN-Zero with self-attention alone"
        if module._chunk_size is not None:
            return "its feed-forward is chunked"
        return norm_problem(module, "norm3")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (0.05 * torch.randn(2, 3, module.dim),), _conditioning(module.norm1)

    @staticmethod
    def forward(
        module: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        masked = (attention_mask, encoder_hidden_states, encoder_attention_mask, *more, *named.values())
        if hidden_states.ndim != 3 or cross_attention_kwargs or any(value is not None for value in masked):
            return NotImplemented
        y, *modulation = module.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        return second_half(module, hidden_states, module.attn1(y), modulation, module.norm3.eps, module.ff)


class AdaLayerNormZeroForm(Form):
    """AdaLayerNormZero: the modulated norm, and the modulation of what follows."""

    what = "adaptive norm"
    ops = ("adaln_modulate",)
    required = frozenset({"silu", "linear", "norm"})
    allowed = frozenset({"emb"})

    @staticmethod
    def unfit(module: Any) -> str | None:
        return norm_problem(module, "norm")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = _conditioning(module) | {"hidden_dtype": torch.float64}
        return (0.05 * torch.randn(2, 3, module.norm.normalized_shape[-1]),), kwargs

    @staticmethod
    def forward(
        module: Any,
        x: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> Any:
        if x.ndim != 3:
            return NotImplemented
        if module.emb is not None:
            emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = module.linear(module.silu(emb)).chunk(6, dim=1)
        shift, scale = (part.expand(len(x), -1) for part in (shift, scale))
        dtype, backend = compute_dtype(x, scale), on(module, "adaln_modulate")
        y = kernels.adaln_modulate(x, shift, scale, module.norm.eps, out_dtype=dtype, backend=backend)
        return y, *others


def _conditioning(norm: Any) -> dict[str, Any]:
    """A timestep and a label for each of two samples, or their embedding where it is made elsewhere."""
    if norm.emb is None:
        return {"emb": torch.randn(2, inputs_of(norm.linear))}
    return {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 1])}


class AttentionForm(Form):
    """Attention under its standard processor: self-attention over three linears, without mask."""

    what = "attention"
    ops = ("attention",)
    required = frozenset({"to_q", "to_k", "to_v", "to_out"})

    @staticmethod
    def unfit(module: Any) -> str | None:
        processor = type(module.processor)
        if processor.__name__ not in PROCESSORS or not processor.__module__.startswith("diffusers."):
            return f"its processor is {processor.__name__}, expected {' or '.join(PROCESSORS)}"
        for name in ("norm_q", "norm_k", "group_norm", "spatial_norm", "residual_connection", "fused_projections"):
            if getattr(module, name):
                return f"it has {name}"
        if module.is_cross_attention or module.rescale_output_factor != 1 or not module.scale_qk:
            return "it is not a scaled self-attention"
        return idle_problem(module.to_out, "1")

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(2, 3, module.query_dim),), {}

    @staticmethod
    def forward(module: Any, hidden_states: Tensor, *more: Any, **named: Any) -> Any:
        if hidden_states.ndim != 3 or any(value is not None for value in (*more, *named.values())):
            return NotImplemented
        projections = (module.to_q, module.to_k, module.to_v)
        q, k, v = (linear(hidden_states).unflatten(2, (module.heads, -1)) for linear in projections)
        o = kernels.attention(q, k, v, scale=module.scale, backend=on(module, "attention"))
        return module.to_out[0](o.flatten(2))


class FeedForwardForm(Form):
    """FeedForward with activation "gelu-approximate"."""

    what = "MLP"
    ops = ("gelu_mlp",)
    required = frozenset({"net"})

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        return super().is_kind(module) and len(module.net) >= 3 and hasattr(module.net[0], "proj")

    @staticmethod
    def unfit(module: Any) -> str | None:
        if len(module.net) != 3:
            return f"it has {len(module.net)} layers, expected activation, dropout, linear"
        first, _, last = module.net
        named = type(first).__name__ == "GELU" and getattr(first, "approximate", None) == "tanh"
        if not named or not is_plain(first, type(first)):
            return "its activation is not a bare tanh-GELU"
        return (
            linear_problem("net.0.proj", first.proj) or linear_problem("net.2", last) or idle_problem(module.net, "1")
        )

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(2, 3, module.net[0].proj.in_features),), {}

    @staticmethod
    def forward(module: Any, hidden_states: Tensor, *more: Any, **named: Any) -> Any:
        if more or named:
            return NotImplemented
        fc1, fc2 = module.net[0].proj, module.net[2]
        backend = on(module, "gelu_mlp")
        return kernels.gelu_mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, backend=backend)


class PatchEmbedForm(Form):
    """PatchEmbed, which adds its table itself, for inputs of the size that the model was built for."""

    what = "patch embedding"
    ops = ("patchify",)
    required = frozenset({"proj"})

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        return super().is_kind(module) and hasattr(module, "pos_embed_max_size")

    @staticmethod
    def unfit(module: Any) -> str | None:
        proj = module.proj
        if module.pos_embed is None or module.pos_embed_max_size or module.layer_norm or not module.flatten:
            return "it does more or less than adding a fixed table of positions"
        if problem := linear_problem("proj", proj, nn.Conv2d):
            return problem
        if proj.kernel_size != proj.stride or proj.padding != (0, 0) or proj.dilation != (1, 1) or proj.groups != 1:
            return "its convolution is not one of separate patches"
        return None

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        height, width = module.height * module.patch_size, module.width * module.patch_size
        return (torch.randn(2, module.proj.in_channels, height, width),), {}

    @staticmethod
    def forward(module: Any, latent: Tensor) -> Any:
        p = module.patch_size
        if latent.ndim != 4 or latent.shape[2:] != (module.height * p, module.width * p):
            return NotImplemented
        proj = module.proj
        tokens = kernels.patchify(latent, proj.weight, proj.bias, module.pos_embed, backend=on(module, "patchify"))
        return tokens.to(compute_dtype(latent, proj.weight))


class TimestepsForm(Form):
    """Timesteps: the sinusoid, [cos | sin]."""

    what = "sinusoid of the timestep"
    ops = ("timestep_embedding",)
    dtype = torch.float32

    @classmethod
    def is_kind(cls, module: Any) -> bool:
        return not module._modules and hasattr(module, "downscale_freq_shift") and hasattr(module, "flip_sin_to_cos")

    @staticmethod
    def unfit(module: Any) -> str | None:
        usual = module.flip_sin_to_cos and module.num_channels % 2 == 0 and module.scale == 1
        return None if usual else "it is not an unscaled [cos | sin] of even width"

    @staticmethod
    def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.tensor([0.25, 7.0]),), {}

    @staticmethod
    def forward(module: Any, timesteps: Tensor) -> Any:
        if timesteps.ndim != 1:
            return NotImplemented
        # P^(-i / (half - shift)) as the op has it, P'^(-i / half).
        half = module.num_channels // 2
        max_period = 10000 ** (half / (half - module.downscale_freq_shift))
        backend = on(module, "timestep_embedding")
        return kernels.timestep_embedding(timesteps, module.num_channels, max_period, backend=backend)


FORMS: tuple[type[Form], ...] = (
    BlockForm,
    AdaLayerNormZeroForm,
    AttentionForm,
    FeedForwardForm,
    PatchEmbedForm,
    TimestepsForm,
)
