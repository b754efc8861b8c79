"""The model of ditfast.reference that a configuration describes, run as a recipe says, by ditfast's names."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditfast import reference
from ditfast.config import ModelConfig
from ditfast.layers import FAMILIES, DiffusionTransformer, LargeDiT
from ditfast.paddle import from_dit_llama, to_dit_llama


@dataclass(frozen=True)
class Recipe:
    """How the reference is run: attention by the fastest SDPA, torch.compile, torch's checkpoint around every block.

    plain_loop: AdamW as torch makes it, the EMA parameter by parameter, the loss read in every step, as the training
    scripts of DiT and fast-DiT do; otherwise fused AdamW and the EMA by foreach.
    """

    sdpa: bool = False
    compiled: bool = False
    checkpointed: bool = False
    plain_loop: bool = False


class _Attention(reference.Attention):
    """The reference's attention by torch's op."""

    def forward(self, x, angles=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = reference.rotate(self.q_norm(q), angles), reference.rotate(self.k_norm(k), angles)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _LlamaAttention(reference.LlamaAttention):
    """LargeDiT's by torch's op, which knows heads that share their keys and values."""

    def forward(self, x, angles):
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        q, k = reference.rotate(q, angles), reference.rotate(k, angles)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.group > 1)
        return self.wo(out.transpose(1, 2).flatten(2))


class _TimestepEmbedder(reference.TimestepEmbedder):
    """The reference's embedding; in float64 its angles too, as in fp32 their rounding is an error like any other's."""

    def forward(self, t):
        dtype, half = self.mlp[0].weight.dtype, self.frequency_size // 2
        if dtype is not torch.float64:
            return super().forward(t)
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
        angle = t[:, None].to(dtype) * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class _Patches(nn.Linear):
    """LargeDiT's patches in the weights' dtype under autocast too, as DiT's are by their table of positions."""

    def forward(self, x):
        return super().forward(x).to(self.weight.dtype)


class _Checkpointed(nn.Module):
    """Before a block's class: the block, which its backward computes again."""

    def forward(self, *inputs):
        # The reentrant form, which was torch's default for fast-DiT.
        return checkpoint(super().forward, *inputs, use_reentrant=True)


_SDPA: dict[type[nn.Module], type[nn.Module]] = {
    reference.Attention: _Attention,
    reference.LlamaAttention: _LlamaAttention,
}
_CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {
    block: type(block.__name__, (_Checkpointed, block), {})
    for block in (reference.DiTBlock, reference.LightningDiTBlock, reference.LlamaBlock)
}


def build_reference(config: ModelConfig, state: Mapping[str, Tensor], recipe: Recipe = Recipe()) -> Any:
    """The reference model of a resolved configuration with a copy of the weights of `state`, on their device, in fp32.

    `state` has ditfast's names. The model drops no labels: that is done before, alike for all. ValueError for a shape
    that the reference does not have.
    """
    ours, arguments = _member(config)
    with next(iter(state.values())).device:
        model = getattr(reference, type(ours).__name__)(**arguments)
    if isinstance(ours, LargeDiT):
        ours.load_state_dict(dict(state), assign=True)
        state = _turned({name: torch.from_numpy(value) for name, value in to_dit_llama(ours).items()})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: value for name, value in model.state_dict().items() if name not in trained}
    model.load_state_dict(frozen | dict(state))
    model.y_embedder.dropout = 0
    model.t_embedder.__class__ = _TimestepEmbedder
    if isinstance(ours, LargeDiT):
        model.x_embedder.__class__ = _Patches
    swapped = (_SDPA if recipe.sdpa else {}) | (_CHECKPOINTED if recipe.checkpointed else {})
    for module in model.modules():
        module.__class__ = swapped.get(type(module), type(module))
    return model


def ditfast_names(config: ModelConfig, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the reference model's parameters, such as gradients, by ditfast's names and in its layouts."""
    ours, _ = _member(config)
    return from_dit_llama(_turned(values), ours) if isinstance(ours, LargeDiT) else dict(values)


def _turned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Between the reference's layout of LargeDiT and PaddleMIX's, whose Linears hold the transposed weight."""
    return {n: v.T if v.ndim == 2 and "embedding_table" not in n else v for n, v in values.items()}


def _member(config: ModelConfig) -> tuple[DiffusionTransformer, dict[str, Any]]:
    """The family's own model of a configuration, on meta, and the arguments that make it, the reference's as well."""
    a = config.architecture
    special: dict[str, dict[str, Any]] = {
        "DiT": {},
        "SiT": {},
        "LightningDiT": {
            "use_qknorm": a.qk_norm is not None,
            "use_swiglu": a.mlp == "swiglu",
            "use_rope": a.rope is not None,
            "use_rmsnorm": a.norm.kind == "rms",
            "wo_shift": a.block == "adaln_zero_no_shift",
        },
        "LargeDiT": {
            "num_kv_heads": a.kv_heads,
            "multiple_of": a.mlp_multiple,
            "norm_eps": a.norm.eps,
            "qk_norm": a.qk_norm is not None,
        },
    }
    if config.input_size is not None and config.input_size[0] == config.input_size[1]:
        shared = {
            "input_size": config.input_size[0], "patch_size": a.patch_size, "in_channels": config.in_channels,
            "hidden_size": a.hidden_size, "num_heads": a.num_heads, "mlp_ratio": a.mlp_ratio,
            "class_dropout_prob": config.class_dropout_prob, "num_classes": config.num_classes,
            "learn_sigma": config.learn_sigma,
        }  # fmt: skip
        for family, options in special.items():
            make: Callable[..., DiffusionTransformer] = FAMILIES[family]
            arguments = {**shared, **options, "depth": a.depth}
            with torch.device("meta"):  # one block: the others cost time and tell nothing
                if make(**arguments | {"depth": 1}).architecture == replace(a, depth=1):
                    return make(**arguments), arguments
    raise ValueError(
        f"the reference has square inputs and the architectures of {', '.join(special)}, got {config.input_size} and "
        f"{a}"
    )
