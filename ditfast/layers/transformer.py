"""The transformer of the whole family: DiT, SiT, LargeDiT and LightningDiT differ in its architecture alone."""

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.architecture import MODULATION, Architecture
from ditfast.layers.attention import Rope
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
from ditfast.layers.rope import RotaryEmbedding

_BLOCKS = {"cross_attention": CrossAttentionBlock, "in_context": InContextBlock} | dict.fromkeys(MODULATION, DiTBlock)


class DiffusionTransformer(nn.Module):
    """Class-conditional diffusion transformer of any architecture; parameters have the official DiT's names.

    Args:
        architecture: sizes and forms.
        input_size: latent height = width, or (height, width); the patch size must divide both.
        in_channels: C; the network has 2C output channels (prediction, variance) with `learn_sigma`, else C.
        class_dropout_prob: probability of replacing a label by the null class `num_classes` in training.
        num_classes: labels are 0..num_classes - 1; the null class is row `num_classes` of the table.

    Attributes that a trainer may set:
        stream_dtype: of the residual stream; None keeps what the embedding gives (fp32 under autocast, officially).
        recompute: what backward computes again: "none", "ops", "mlp", "block", or "block:k" (see recompute.py).

    Raises ValueError for sizes that do not divide, inputs of another shape, and labels out of range (on a CPU; on a GPU
    that is the embedding's device assertion, so that nothing waits).
    """

    def __init__(
        self,
        architecture: Architecture,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        for name, value in {"in_channels": in_channels, "num_classes": num_classes}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        a = self.architecture = architecture
        self.learn_sigma, self.block = learn_sigma, a.block
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.patch_size, self.num_heads = a.patch_size, a.num_heads
        self.stream_dtype: torch.dtype | None = None
        self._recompute = "none"

        self.x_embedder = PatchEmbed(input_size, a.patch_size, in_channels, a.hidden_size)
        self.t_embedder = TimestepEmbedder(a.conditioning_width)
        self.y_embedder = LabelEmbedder(num_classes, a.conditioning_width, class_dropout_prob)
        grid = self.x_embedder.grid_size
        self.pos_embed: nn.Parameter | None = None
        if "sincos" in a.position:
            self.pos_embed = nn.Parameter(sincos_pos_embed(a.hidden_size, grid), requires_grad=False)
        self.feat_rope = RotaryEmbedding(a.rope, grid, a.head_dim) if a.rope else None
        self.blocks = nn.ModuleList(_BLOCKS[a.block](a) for _ in range(a.depth))
        self.final_layer = (FinalLayer if a.adaptive else PlainFinalLayer)(a, self.out_channels)
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
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for name, parameter in self.named_parameters():
            gate = "gate" in MODULATION.get(self.block, ()) and name.endswith("adaLN_modulation.1.weight")
            if gate or name in ("final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Predicts noise (and variance), or a velocity, of noisy x.

        Args:
            x: (B, C, H, W) noisy input, floating point.
            t: (B,) original timesteps 0..T - 1, or SiT's times in [0, 1].
            y: (B,) int64 labels, 0..num_classes.
            force_drop_ids: (B,) optional, in place of the random draw; 1 or True replaces that label by the null class.

        Returns: (B, 2C or C, H, W).
        """
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t and y must be (B,) = ({x.shape[0]},), got {tuple(t.shape)} and {tuple(y.shape)}")
        stream = self._embed(x)
        t_emb = self.t_embedder(t)
        y_emb = self.y_embedder(y, self.training, force_drop_ids)
        tokens = self._run_adaptive if self.architecture.adaptive else self._run_tokens
        return self._image(tokens(stream, t_emb, y_emb))

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
        pending, rope = (self._embed(x), None, None), self._rope()
        for block, row in zip(self.blocks, rows, strict=True):
            pending = block.forward_pending(pending, row, rope)
        return self._image(self.final_layer.forward_pending(pending, last))

    @property
    def modulation_width(self) -> int:
        """Numbers that modulate one sample: 6D (without gates 4D) for every block and 2D for the final layer."""
        return sum(self._modulation_widths)

    @property
    def _modulation_widths(self) -> list[int]:
        width = self.architecture.hidden_size
        return [2 * len(MODULATION[self.block]) * width] * len(self.blocks) + [2 * width]

    def modulation_obstacle(self) -> str | None:
        """Why modulation cannot be computed ahead of the blocks, or None.

        Blocks with hooks or in wrappers expect to be called as officially, and hooks of the embedders and of the
        modulation itself to be called in every step.
        """
        if not self.architecture.adaptive:
            return f"blocks of kind {self.block!r} have no adaptive norms"
        if type(self).forward is not DiffusionTransformer.forward:
            return f"{type(self).__name__} has a forward of its own"
        kinds = {"final_layer": FinalLayer} | {f"blocks.{i}": DiTBlock for i in range(len(self.blocks))}
        for name, module in self.named_modules():
            head = name.startswith(("t_embedder", "y_embedder")) or "adaLN_modulation" in name
            if (name in kinds or head or not name) and not is_plain(module, kinds.get(name, type(module))):
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

    def _image(self, tokens: Tensor) -> Tensor:
        """What forward returns of the final layer's tokens."""
        out = self.unpatchify(tokens)
        return out if self.architecture.returns_sigma else out[:, : self.in_channels]

    def _rope(self) -> Rope | None:
        return None if self.feat_rope is None else self.feat_rope()

    def _embed(self, x: Tensor) -> Tensor:
        """The residual stream at its start."""
        stream = self.x_embedder(x, self.pos_embed)
        return stream if self.stream_dtype is None else stream.to(self.stream_dtype)

    def _run_adaptive(self, x: Tensor, t_emb: Tensor, y_emb: Tensor) -> Tensor:
        c, rope = t_emb + y_emb, self._rope()
        pending = (x, None, None)
        for block in self.blocks:
            if is_plain(block, DiTBlock):
                pending = block.forward_pending(pending, block.adaLN_modulation(c), rope)
            else:
                # Hooks and wrappers expect the official (x, c) -> x, so the residual is settled at this boundary.
                more = () if rope is None else (rope,)
                pending = (block(settle(*pending), c, *more), None, None)
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
