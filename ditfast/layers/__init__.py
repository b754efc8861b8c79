"""DiT layers: thin `nn.Module`s over `ditfast.kernels`, with the official DiT's names, arguments and state dict."""

from ditfast.layers.attention import Attention, CrossAttention
from ditfast.layers.block import CrossAttentionBlock, DiTBlock, FinalLayer, InContextBlock, PlainFinalLayer
from ditfast.layers.dit import BLOCK_VARIANTS, DiT, DiT_models
from ditfast.layers.embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_pos_embed
from ditfast.layers.flops import attention_macs, count_parameters, forward_macs, linear_rows, training_flops
from ditfast.layers.memory import activation_bytes, block_bytes
from ditfast.layers.mlp import Mlp
from ditfast.layers.recompute import RECOMPUTE_POLICIES, policy_of_block

__all__ = [
    "BLOCK_VARIANTS",
    "RECOMPUTE_POLICIES",
    "Attention",
    "CrossAttention",
    "CrossAttentionBlock",
    "DiT",
    "DiTBlock",
    "DiT_models",
    "FinalLayer",
    "InContextBlock",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "PlainFinalLayer",
    "TimestepEmbedder",
    "activation_bytes",
    "attention_macs",
    "block_bytes",
    "count_parameters",
    "forward_macs",
    "linear_rows",
    "policy_of_block",
    "sincos_pos_embed",
    "training_flops",
]
