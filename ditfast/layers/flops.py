"""Counts of parameters and of multiply-accumulates, from a model's shapes. One MAC is two FLOPs."""

from torch import nn

from ditfast.layers.transformer import DiffusionTransformer


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; the official counts include the frozen pos_embed."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def forward_macs(model: DiffusionTransformer) -> int:
    """Multiply-accumulates of one image's forward: every Linear and convolution, and both attention products.

    The "Gflops" published for DiT are these MACs. Elementwise work is not counted.
    """
    tokens = model.x_embedder.num_patches
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    width = model.architecture.hidden_size
    stream = tokens + (2 if model.block == "in_context" else 0)
    total = tokens * model.x_embedder.proj.weight.numel()
    for name, linear in linears.items():
        if name.startswith("t_embedder") or "adaLN_modulation" in name:
            rows = 1
        elif name.endswith("cross_attn.kv"):
            rows = 2
        elif name.startswith("final_layer"):
            rows = tokens
        else:
            rows = stream
        total += rows * linear.weight.numel()
    attention = 2 * stream * stream * width
    if model.block == "cross_attention":
        attention += 2 * stream * 2 * width
    return total + len(model.blocks) * attention


def training_flops(model: DiffusionTransformer) -> int:
    """FLOPs of one image's training step: forward and twice that for backward; recomputed work does not count."""
    return 3 * 2 * forward_macs(model)
