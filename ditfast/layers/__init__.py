"""Layers of the DiT family: thin `nn.Module`s over `ditfast.kernels`, with the official names and state dicts."""

from ditfast.layers.architecture import BLOCK_VARIANTS, Architecture, NormForm
from ditfast.layers.attention import Attention, CrossAttention
from ditfast.layers.block import CrossAttentionBlock, DiTBlock, FinalLayer, InContextBlock, PlainFinalLayer
from ditfast.layers.dit import DiT, DiT_models
from ditfast.layers.embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_pos_embed
from ditfast.layers.flops import (
    attention_macs,
    count_parameters,
    forward_macs,
    linear_rows,
    mlp_linears,
    training_flops,
)
from ditfast.layers.large_dit import LargeDiT, LargeDiT_models
from ditfast.layers.lightning_dit import LightningDiT, LightningDiT_models
from ditfast.layers.memory import activation_bytes, block_bytes
from ditfast.layers.mlp import Mlp, SwiGlu
from ditfast.layers.norm import Norm
from ditfast.layers.recompute import RECOMPUTE_POLICIES, policy_of_block
from ditfast.layers.sit import SiT, SiT_models
from ditfast.layers.transformer import DiffusionTransformer

FAMILIES: dict[str, type[DiffusionTransformer]] = {cls.__name__: cls for cls in (DiT, SiT, LightningDiT, LargeDiT)}
MODELS = {**DiT_models, **SiT_models, **LightningDiT_models, **LargeDiT_models}  # every preset, by its published name

__all__ = [
    "BLOCK_VARIANTS",
    "FAMILIES",
    "MODELS",
    "RECOMPUTE_POLICIES",
    "Architecture",
    "Attention",
    "CrossAttention",
    "CrossAttentionBlock",
    "DiT",
    "DiTBlock",
    "DiT_models",
    "DiffusionTransformer",
    "FinalLayer",
    "InContextBlock",
    "LabelEmbedder",
    "LargeDiT",
    "LargeDiT_models",
    "LightningDiT",
    "LightningDiT_models",
    "Mlp",
    "Norm",
    "NormForm",
    "PatchEmbed",
    "PlainFinalLayer",
    "SiT",
    "SiT_models",
    "SwiGlu",
    "TimestepEmbedder",
    "activation_bytes",
    "attention_macs",
    "block_bytes",
    "count_parameters",
    "forward_macs",
    "linear_rows",
    "mlp_linears",
    "policy_of_block",
    "sincos_pos_embed",
    "training_flops",
]
