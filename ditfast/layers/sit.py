"""The Scalable Interpolant Transformer (Ma et al. 2024, arXiv:2401.08740): DiT at times in [0, 1], of twelve sizes."""

from functools import partial

from ditfast.layers.architecture import Architecture
from ditfast.layers.dit import SIZES
from ditfast.layers.transformer import DiffusionTransformer


class SiT(DiffusionTransformer):
    """SiT with the constructor arguments and state-dict names of the official code; they are `DiT`'s.

    forward(x, t, y) takes t in [0, 1], 0 being noise, and returns (B, C, H, W): of the 2C channels that the network has
    with `learn_sigma` (the official files have them) the second half is discarded.
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
    ):
        architecture = Architecture(patch_size, hidden_size, depth, num_heads, mlp_ratio=mlp_ratio, returns_sigma=False)
        super().__init__(architecture, input_size, in_channels, class_dropout_prob, num_classes, learn_sigma)


SiT_models = {
    f"SiT-{size}/{patch}": partial(SiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
