"""LargeDiT, the DiT with llama's blocks: RMSNorm, SwiGLU, 1-D RoPE, QK-norm, as in PaddleMIX's DiT_Llama."""

from functools import partial

from ditfast.layers.architecture import Architecture, NormForm
from ditfast.layers.transformer import DiffusionTransformer


class LargeDiT(DiffusionTransformer):
    """LargeDiT at original timesteps 0..T - 1, as a DiT; `ditfast.paddle` converts PaddleMIX's parameters.

    num_kv_heads: heads of k and v; None: num_heads. multiple_of: the SwiGLU's width is rounded up to a multiple of it.
    qk_norm: LayerNorm of q and k over all their channels. The other arguments are `DiT`'s.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 3072,
        depth: int = 32,
        num_heads: int = 32,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
    ):
        architecture = Architecture(
            patch_size,
            hidden_size,
            depth,
            num_heads,
            num_kv_heads,
            mlp="swiglu",
            mlp_ratio=mlp_ratio,
            mlp_multiple=multiple_of,
            bias=False,
            norm=NormForm("rms", norm_eps, weight=True),
            qk_norm=NormForm("layer", 1e-5, weight=True, bias=True) if qk_norm else None,
            qk_norm_over="width",
            position=("rope_1d",),
            conditioning_limit=1024,
        )
        super().__init__(architecture, input_size, in_channels, class_dropout_prob, num_classes, learn_sigma)


LargeDiT_models = {
    "LargeDiT-tiny/2": partial(LargeDiT, depth=2, hidden_size=64, num_heads=4, num_kv_heads=2, multiple_of=16),
    "LargeDiT-600M/2": partial(LargeDiT, depth=16, hidden_size=1536),
    "LargeDiT-3B/2": partial(LargeDiT, depth=32, hidden_size=3072, qk_norm=False),
    "LargeDiT-7B/2": partial(LargeDiT, depth=32, hidden_size=4096),
}
