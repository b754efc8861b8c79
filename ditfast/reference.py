"""The oracle: DiT (Peebles & Xie 2022, arXiv:2212.09748) in plain PyTorch, then SiT, LightningDiT and LargeDiT.

Any dtype, never optimized. Everything else in ditfast is verified against this file, and its DiT against outputs of the
official implementation (tests/golden). Parameter names are the official ones, so official checkpoints load with
`load_state_dict`; LargeDiT's are PaddleMIX's, whose Linears hold the transposed weight.
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


def rotate(x, angles):
    """x (B, H, T, head_dim), its neighbouring channels turned as pairs by cos and sin (T, head_dim / 2)."""
    if angles is None:
        return x
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), (table.to(x.dtype) for table in angles)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


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
    def __init__(self, hidden_size, num_heads, norm=nn.Identity):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = norm(hidden_size // num_heads), norm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, angles=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size, ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels, norm=layer_norm, conditioning_width=None):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.norm_final = norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(conditioning_width or hidden_size, 2 * hidden_size))

    def forward(self, x, c, h, w):
        """Tokens (B, h * w, hidden_size) -> image (B, out_channels, h * p, w * p)."""
        x, p = self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1))), self.patch_size
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, h, w, p, p, self.out_channels))
        return x.reshape(-1, self.out_channels, h * p, w * p)


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
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c, h, w)

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


class SiT(DiT):
    """DiT's network (Ma et al. 2024, arXiv:2401.08740) at t in [0, 1]; what learn_sigma adds is discarded."""

    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : self.in_channels]


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class SwiGLU(nn.Module):
    def __init__(self, hidden_size, width):
        super().__init__()
        self.w12, self.w3 = nn.Linear(hidden_size, 2 * width), nn.Linear(width, hidden_size)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class VisionRope(nn.Module):
    """The first half of a head's pairs turns by the token's row, the second by its column; float32 as in the files."""

    def __init__(self, head_dim, grid):
        super().__init__()
        omega = 10000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        angles = torch.cat([position.reshape(-1, 1) * omega for position in (rows, columns)], dim=1)
        for name, table in (("freqs_cos", angles.cos()), ("freqs_sin", angles.sin())):
            self.register_buffer(name, table.float().repeat_interleave(2, dim=1))

    def forward(self):
        return self.freqs_cos[:, ::2], self.freqs_sin[:, ::2]


class LightningDiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift):
        super().__init__()
        norm = RMSNorm if use_rmsnorm else layer_norm
        of_heads = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.norm1, self.norm2 = norm(hidden_size), norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, of_heads if use_qknorm else nn.Identity)
        width = int(2 / 3 * int(hidden_size * mlp_ratio))
        self.mlp = SwiGLU(hidden_size, width) if use_swiglu else Mlp(hidden_size, mlp_ratio)
        self.wo_shift, rows = wo_shift, (4 if wo_shift else 6) * hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, rows))

    def forward(self, x, c, angles):
        if self.wo_shift:
            scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
            shift_msa = shift_mlp = torch.zeros_like(scale_msa)
        else:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), angles)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LightningDiT(nn.Module):
    """LightningDiT (Yao et al. 2025, arXiv:2501.01423), t in [0, 1]; its switches are the published model's."""

    def __init__(self, input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=False, use_qknorm=False,
                 use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=False):  # fmt: skip
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, grid, grid).float(), requires_grad=False)
        self.feat_rope = VisionRope(hidden_size // num_heads, grid) if use_rope else None
        switches = (use_qknorm, use_swiglu, use_rmsnorm, wo_shift)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(hidden_size, num_heads, mlp_ratio, *switches) for _ in range(depth)
        )
        out_channels = 2 * in_channels if learn_sigma else in_channels
        norm = RMSNorm if use_rmsnorm else layer_norm
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, norm)
        self.initialize_weights()

    forward_with_cfg = DiT.forward_with_cfg

    def initialize_weights(self):
        DiT.initialize_weights(self)

    def forward(self, x, t, y):
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        angles = self.feat_rope and self.feat_rope()
        for block in self.blocks:
            x = block(x, c, angles)
        return self.final_layer(x, c, h, w)[:, : self.in_channels]


class LlamaAttention(nn.Module):
    """QK LayerNorm over the channels of all heads; every key and value head serves num_heads / num_kv_heads queries."""

    def __init__(self, hidden_size, num_heads, num_kv_heads, qk_norm):
        super().__init__()
        self.head_dim, self.group = hidden_size // num_heads, num_heads // num_kv_heads
        kv_width = num_kv_heads * self.head_dim
        self.wq, self.wo = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(hidden_size, kv_width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width) if qk_norm else nn.Identity() for width in (hidden_size, kv_width)
        )

    def forward(self, x, angles):
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class LlamaMlp(nn.Module):
    def __init__(self, hidden_size, width):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, num_kv_heads, width, eps, qk_norm):
        super().__init__()
        self.attention = LlamaAttention(hidden_size, num_heads, num_kv_heads, qk_norm)
        self.feed_forward = LlamaMlp(hidden_size, width)
        self.attention_norm, self.ffn_norm = RMSNorm(hidden_size, eps), RMSNorm(hidden_size, eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(hidden_size, 1024), 6 * hidden_size))

    def forward(self, x, c, angles):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attention(modulate(self.attention_norm(x), shift_msa, scale_msa), angles)
        return x + gate_mlp[:, None] * self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))


class LargeDiT(nn.Module):
    """DiT with llama's blocks, as PaddleMIX's DiT_Llama: tokens turn by their place in the flattened image."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=3072, depth=32, num_heads=32,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, num_kv_heads=None,
                 multiple_of=256, norm_eps=1e-5, qk_norm=True):  # fmt: skip
        super().__init__()
        self.patch_size, self.in_channels, self.head_dim = patch_size, in_channels, hidden_size // num_heads
        conditioning_width = min(hidden_size, 1024)
        self.x_embedder = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.t_embedder = TimestepEmbedder(conditioning_width)
        self.y_embedder = LabelEmbedder(num_classes, conditioning_width, class_dropout_prob)
        width = -(-int(2 * int(hidden_size * mlp_ratio) / 3) // multiple_of) * multiple_of
        shape = (hidden_size, num_heads, num_kv_heads or num_heads, width, norm_eps, qk_norm)
        self.layers = nn.ModuleList(LlamaBlock(*shape) for _ in range(depth))
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, conditioning_width=conditioning_width)

    forward_with_cfg = DiT.forward_with_cfg

    def forward(self, x, t, y):
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.x_embedder(F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2))
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device) / self.head_dim
        angles = torch.outer(torch.arange(h * w, dtype=torch.float64, device=x.device), 10000.0**-pairs)
        tables = angles.cos().float(), angles.sin().float()
        for block in self.layers:
            x = block(x, c, tables)
        return self.final_layer(x, c, h, w)
