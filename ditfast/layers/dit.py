"""The Diffusion Transformer (Peebles & Xie 2022, arXiv:2212.09748) over ditfast's kernels, and its twelve sizes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.block import (
    CrossAttentionBlock,
    DiTBlock,
    FinalLayer,
    InContextBlock,
    PlainFinalLayer,
    settle,
)
from ditfast.layers.embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_pos_embed
from ditfast.layers.plain import is_plain
from ditfast.layers.recompute import Block, policy_of_block

BLOCK_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "adaln_zero": partial(DiTBlock, gated=True),
    "adaln": partial(DiTBlock, gated=False),
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


class DiT(nn.Module):
    """Class-conditional DiT with the constructor arguments and state-dict names of the official code.

    Args:
        input_size: latent height = width, or (height, width).
        patch_size: side of a square patch; must divide both sides of `input_size`.
        in_channels: C; the output has 2C channels (prediction, variance) with `learn_sigma`, else C.
        hidden_size, depth, num_heads, mlp_ratio: width D, number of blocks, heads (dividing D), MLP width over D.
        class_dropout_prob: probability of replacing a label by the null class `num_classes` in training.
        num_classes: labels are 0..num_classes - 1; the null class is row `num_classes` of the table.
        block: "adaln_zero" (the DiT of the paper's results), "adaln", "cross_attention" or "in_context".

    Attributes that a trainer may set:
        stream_dtype: of the residual stream; None keeps what the embedding gives (fp32 under autocast, officially).
        recompute: what backward computes again: "none", "ops", "mlp", "block", or "block:k" (see recompute.py).

    Raises ValueError for sizes that do not divide, unknown blocks, inputs of another shape, and labels out of range
    (on a CPU; on a GPU that is the embedding's device assertion, so that nothing waits).
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
        super().__init__()
        if block not in BLOCK_VARIANTS:
            raise ValueError(f"block must be one of {', '.join(BLOCK_VARIANTS)}, got {block!r}")
        counts = {"patch_size": patch_size, "in_channels": in_channels, "hidden_size": hidden_size, "depth": depth}
        for name, value in (counts | {"num_heads": num_heads, "num_classes": num_classes}).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if not mlp_ratio * hidden_size >= 1:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}")
        self.learn_sigma, self.block = learn_sigma, block
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.patch_size, self.num_heads = patch_size, num_heads
        self.stream_dtype: torch.dtype | None = None
        self._recompute = "none"

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        table = sincos_pos_embed(hidden_size, self.x_embedder.grid_size)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        make_block = BLOCK_VARIANTS[block]
        self.blocks = nn.ModuleList(make_block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.adaptive = block.startswith("adaln")
        final = FinalLayer if self.adaptive else PlainFinalLayer
        self.final_layer = final(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def recompute(self) -> str:
        return self._recompute

    @recompute.setter
    def recompute(self, policy: str) -> None:
        for index, block in enumerate(self.blocks):
            of_block = policy_of_block(policy, index)
            for module in block.modules():
                if isinstance(module, Block):
                    module.recompute = of_block
        self._recompute = policy

    def initialize_weights(self) -> None:
        """Xavier-uniform Linears, N(0, 0.02) embedders; the gates of adaLN-Zero and the final layer start at zero.

        Drawn in the official order, so that one seed gives one model.
        """
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for module in [*linears, self.x_embedder.proj]:
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for name, parameter in self.named_parameters():
            gate = self.block == "adaln_zero" and name.endswith("adaLN_modulation.1.weight")
            if gate or name in ("final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Predicts noise (and variance) of noisy x.

        Args:
            x: (B, C, H, W) noisy input, floating point.
            t: (B,) original timesteps, 0..T - 1.
            y: (B,) int64 labels, 0..num_classes.
            force_drop_ids: (B,) optional, in place of the random draw; 1 or True replaces that label by the null class.

        Returns: (B, 2C or C, H, W).
        """
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t and y must be (B,) = ({x.shape[0]},), got {tuple(t.shape)} and {tuple(y.shape)}")
        stream = self._embed(x)
        t_emb = self.t_embedder(t)
        y_emb = self.y_embedder(y, self.training, force_drop_ids)
        tokens = self._run_adaptive if self.adaptive else self._run_tokens
        return self.unpatchify(tokens(stream, t_emb, y_emb))

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """What `forward` makes of t (R,) and y (R,) alone: the modulation of every block and of the final layer.

        Side by side, (R, modulation_width), for `forward_modulated`; no label is dropped. ValueError with the reason
        where `modulation_obstacle` knows one.
        """
        if obstacle := self.modulation_obstacle():
            raise ValueError(f"modulation cannot be computed ahead: {obstacle}; call the model itself")
        c = self.t_embedder(t) + self.y_embedder(y, train=False)
        return torch.cat([layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)], dim=1)

    def forward_modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`forward` of noisy x (B, C, H, W) with rows (B, modulation_width) of what `modulations` returned."""
        if modulation.shape != (len(x), self.modulation_width):
            expected = (len(x), self.modulation_width)
            raise ValueError(f"modulation must be (B, modulation_width) = {expected}, got {tuple(modulation.shape)}")
        *rows, last = modulation.split(self._modulation_widths, dim=1)
        pending = (self._embed(x), None, None)
        for block, row in zip(self.blocks, rows, strict=True):
            pending = block.forward_pending(pending, row)
        return self.unpatchify(self.final_layer.forward_pending(pending, last))

    @property
    def modulation_width(self) -> int:
        """Numbers that modulate one sample: 6D (without gates 4D) for every block and 2D for the final layer."""
        return sum(self._modulation_widths)

    @property
    def _modulation_widths(self) -> list[int]:
        width = self.pos_embed.shape[-1]
        return [(6 if self.block == "adaln_zero" else 4) * width] * len(self.blocks) + [2 * width]

    def modulation_obstacle(self) -> str | None:
        """Why modulation cannot be computed ahead of the blocks, or None.

        Blocks with hooks or in wrappers expect to be called as officially, and hooks of the embedders and of the
        modulation itself to be called in every step.
        """
        if not self.adaptive:
            return f"blocks of kind {self.block!r} have no adaptive norms"
        kinds = {"": DiT, "final_layer": FinalLayer} | {f"blocks.{i}": DiTBlock for i in range(len(self.blocks))}
        for name, module in self.named_modules():
            head = name.startswith(("t_embedder", "y_embedder")) or "adaLN_modulation" in name
            if (name in kinds or head) and not is_plain(module, kinds.get(name, type(module))):
                return f"{name or 'the model'} has hooks, is compiled, or is another class or wrapper"
        return None

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int | None = 3) -> Tensor:
        """Classifier-free guidance on a doubled batch: y holds n labels then n null labels, and only x[:n] is read.

        `channels` are guided: 3 is the official form (its published FIDs use it), None guides all C predicted ones.
        The others and the variance stay those of each half; where C is smaller than `channels`, all C are guided.
        Returns (2n, 2C or C, H, W).
        """
        if channels is not None and channels < 1:
            raise ValueError(f"guided channels must be at least 1, or None for all, got {channels}")
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        channels = self.in_channels if channels is None else min(channels, self.in_channels)
        cond, uncond = out[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, p * p * out_channels) -> (B, out_channels, H, W)."""
        return kernels.unpatchify(tokens, self.patch_size, self.x_embedder.grid_size)

    def _embed(self, x: Tensor) -> Tensor:
        """The residual stream at its start."""
        stream = self.x_embedder(x, self.pos_embed)
        return stream if self.stream_dtype is None else stream.to(self.stream_dtype)

    def _run_adaptive(self, x: Tensor, t_emb: Tensor, y_emb: Tensor) -> Tensor:
        c = t_emb + y_emb
        pending = (x, None, None)
        for block in self.blocks:
            if is_plain(block, DiTBlock):
                pending = block.forward_pending(pending, block.adaLN_modulation(c))
            else:
                # Hooks and wrappers expect the official (x, c) -> x, so the residual is settled at this boundary.
                pending = (block(settle(*pending), c), None, None)
        if is_plain(self.final_layer, FinalLayer):
            return self.final_layer.forward_pending(pending, self.final_layer.adaLN_modulation(c))
        return self.final_layer(settle(*pending), c)

    def _run_tokens(self, x: Tensor, t_emb: Tensor, y_emb: Tensor) -> Tensor:
        context = torch.stack([t_emb, y_emb], dim=1).to(x.dtype)
        in_context = self.block == "in_context"
        if in_context:
            x = torch.cat([x, context], dim=1)
        for block in self.blocks:
            x = block(x, context)
        return self.final_layer(x[:, : -context.shape[1]] if in_context else x)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, D, heads

DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
