"""The oracle: the whole DiT (Peebles & Xie 2022, arXiv:2212.09748) in plain PyTorch. Any dtype, never optimized.

Everything else in ditfast is verified against this file, and this file against outputs of the official implementation
(tests/golden). Parameter names are the official ones, so official checkpoints load with `load_state_dict`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, hidden size, heads


def sincos_pos_embed(hidden_size: int, height: int, width: int) -> Tensor:
    """(1, height * width, hidden_size) float64; the first half of the channels encodes the column, the rest the row."""
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        dtype, half = self.mlp[0].weight.dtype, self.frequency_size // 2
        # fp32 on purpose, in every dtype of the model: the official embedding is part of the trained function.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size, dropout):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)
        self.num_classes, self.dropout = num_classes, dropout

    def forward(self, y, train):
        if train and self.dropout > 0:
            y = torch.where(torch.rand(len(y), device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size, ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    """x (B, C, H, W), t (B,) integer timesteps, y (B,) labels -> (B, 2C or C, H, W). The arguments are official."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):  # fmt: skip
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, grid, grid).float(), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for module in [*linears, self.x_embedder.proj]:
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        h, w, p = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size, self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(-1, h, w, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, h * p, w * p)

    def forward_with_cfg(self, x, t, y, cfg_scale, channels=3):
        """Guidance on the first `channels` channels; y holds n labels, then n null labels; only x[:n] is read."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        channels = min(channels, self.in_channels)
        cond, uncond = out[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


DiT_models = {
    f"DiT-{size}/{patch}": lambda shape=shape, patch=patch, **kwargs: DiT(
        depth=shape[0], hidden_size=shape[1], num_heads=shape[2], patch_size=patch, **kwargs
    )
    for size, shape in SIZES.items()
    for patch in (2, 4, 8)
}
