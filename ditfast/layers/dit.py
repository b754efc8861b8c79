"""The Diffusion Transformer (Peebles & Xie 2022, arXiv:2212.09748): the official arguments, and the twelve sizes."""

from functools import partial

from ditfast.layers.architecture import Architecture
from ditfast.layers.transformer import DiffusionTransformer


class DiT(DiffusionTransformer):
    """Class-conditional DiT with the constructor arguments and state-dict names of the official code.

    Args:
        input_size: latent height = width, or (height, width).
        patch_size: side of a square patch; must divide both sides of `input_size`.
        in_channels: C; the output has 2C channels (prediction, variance) with `learn_sigma`, else C.
        hidden_size, depth, num_heads, mlp_ratio: width D, number of blocks, heads (dividing D), MLP width over D.
        class_dropout_prob: probability of replacing a label by the null class `num_classes` in training.
        num_classes: labels are 0..num_classes - 1; the null class is row `num_classes` of the table.
        block: "adaln_zero" (the DiT of the paper's results), "adaln", "cross_attention" or "in_context".

    Raises ValueError for sizes that do not divide and unknown blocks.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        block: str = "adaln_zero",
    ):
        architecture = Architecture(patch_size, hidden_size, depth, num_heads, mlp_ratio=mlp_ratio, block=block)
        super().__init__(architecture, input_size, in_channels, class_dropout_prob, num_classes, learn_sigma)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, D, heads

DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
