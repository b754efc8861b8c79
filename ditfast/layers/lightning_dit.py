"""LightningDiT (Yao et al. 2025, arXiv:2501.01423): RMSNorm, SwiGLU and 2-D RoPE, on latents of 32 channels."""

from functools import partial

from ditfast.layers.architecture import Architecture, NormForm
from ditfast.layers.transformer import DiffusionTransformer


class LightningDiT(DiffusionTransformer):
    """LightningDiT with the constructor arguments and state-dict names of the official code.

    use_rope rotates on top of the sincos table; use_rmsnorm puts a weighted RMSNorm in place of LayerNorm, also of q
    and k, which use_qknorm norms per head; wo_shift leaves the shifts out of the blocks' modulation; use_checkpoint is
    the recompute policy "block". The official class has all of them off by default; here the defaults are the published
    model's, with SwiGLU, RoPE and RMSNorm.

    forward(x, t, y) takes t in [0, 1] and returns (B, C, H, W), discarding what `learn_sigma` adds.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_checkpoint: bool = False,
    ):
        norm = NormForm("rms", weight=True) if use_rmsnorm else NormForm()
        of_heads = norm if use_rmsnorm else NormForm(eps=1e-5, weight=True, bias=True)
        architecture = Architecture(
            patch_size,
            hidden_size,
            depth,
            num_heads,
            mlp="swiglu" if use_swiglu else "gelu",
            mlp_ratio=mlp_ratio,
            block="adaln_zero_no_shift" if wo_shift else "adaln_zero",
            norm=norm,
            final_norm=norm,
            qk_norm=of_heads if use_qknorm else None,
            position=("sincos", "rope_2d") if use_rope else ("sincos",),
            returns_sigma=False,
        )
        super().__init__(architecture, input_size, in_channels, class_dropout_prob, num_classes, learn_sigma)
        if use_checkpoint:
            self.recompute = "block"


# depth, hidden size, heads, patch sizes
LIGHTNING_SIZES = {
    "B": (12, 768, 12, (1, 2)),
    "L": (24, 1024, 16, (2,)),
    "XL": (28, 1152, 16, (1, 2)),
    "1p0B": (24, 1536, 24, (1, 2)),
    "1p6B": (28, 1792, 28, (1, 2)),
}

LightningDiT_models = {
    f"LightningDiT-{size}/{patch}": partial(
        LightningDiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch
    )
    for size, (depth, width, heads, patches) in LIGHTNING_SIZES.items()
    for patch in patches
}
