"""Counts of parameters and of multiply-accumulates, from a model's shapes. One MAC is two FLOPs."""

from torch import nn

from ditfast.layers.transformer import DiffusionTransformer


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; the official counts include the frozen pos_embed."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def linear_rows(model: DiffusionTransformer) -> dict[str, tuple[nn.Linear | nn.Conv2d, int]]:
    """Every Linear, and the patch embedding's convolution, by name, with the rows of it that one image makes."""
    tokens = model.x_embedder.num_patches
    stream = tokens + (2 if model.block == "in_context" else 0)
    found: dict[str, tuple[nn.Linear | nn.Conv2d, int]] = {"x_embedder.proj": (model.x_embedder.proj, tokens)}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if name.startswith("t_embedder") or "adaLN_modulation" in name:
            rows = 1
        elif name.endswith("cross_attn.kv"):
            rows = 2
        elif name.startswith("final_layer"):
            rows = tokens
        else:
            rows = stream
        found[name] = linear, rows
    return found


def mlp_linears(model: DiffusionTransformer) -> tuple[str, str]:
    """The names in a block of the MLP's first and last Linear."""
    names = model.blocks[0].mlp.names
    return f"mlp.{names[0]}", f"mlp.{names[1]}"


def attention_macs(model: DiffusionTransformer) -> int:
    """Multiply-accumulates of both attention products in one image's forward, all blocks together."""
    stream = model.x_embedder.num_patches + (2 if model.block == "in_context" else 0)
    keys = stream + (2 if model.block == "cross_attention" else 0)
    return len(model.blocks) * 2 * stream * keys * model.architecture.hidden_size


def forward_macs(model: DiffusionTransformer) -> int:
    """Multiply-accumulates of one image's forward: every Linear and convolution, and both attention products.

    The "Gflops" published for DiT are these MACs. Elementwise work is not counted.
    """
    products = [rows * layer.weight.numel() for layer, rows in linear_rows(model).values()]
    return attention_macs(model) + sum(products)


def training_flops(model: DiffusionTransformer) -> int:
    """FLOPs of one image's training step: forward and twice that for backward; recomputed work does not count."""
    return 3 * 2 * forward_macs(model)
