"""Embedders: image patches, timesteps, class labels, and the fixed 2-D position table."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import kernels
from ditfast.layers.plain import is_plain


def as_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(height, width) from one int for a square or two for a rectangle."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(n, int) or n <= 0 for n in pair):
        raise ValueError(f"{name} must be a positive int or (height, width) of two, got {value!r}")
    return pair[0], pair[1]


def sincos_pos_embed(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """2-D sine-cosine position table of a (rows, columns) grid, computed in float64.

    Returns (1, rows * columns, hidden_size) float32. The first half of the channels encodes the column, the second
    the row; each half is [sin | cos] with omega_i = 10000^(-i / (hidden_size / 4)) (Vaswani et al. 2017, in 2-D).
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 for 2-D positions, got {hidden_size}")
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


class PatchEmbed(nn.Module):
    """Cuts an image into patches, projects each, and adds its position if given: (B, C, H, W) -> (B, T, D).

    A convolution of stride p is a linear of flattened patches, channels first: LargeDiT's `x_embedder` is one.
    """

    def __init__(self, input_size: int | tuple[int, int], patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.img_size = as_pair(input_size, "input_size")
        self.patch_size = as_pair(patch_size, "patch_size")
        if any(n % p for n, p in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"input_size {self.img_size} must be divisible by patch_size {patch_size}")
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        expected = (self.proj.in_channels, *self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be (B, {', '.join(map(str, expected))}) for this model, got {tuple(x.shape)}")
        x = x.to(self.proj.weight.dtype)
        if not is_plain(self.proj, nn.Conv2d):
            tokens = self.proj(x).flatten(2).transpose(1, 2)
            return tokens if pos_embed is None else tokens + pos_embed
        if pos_embed is None:
            patches = F.pixel_unshuffle(x, self.patch_size[0]).flatten(2).transpose(1, 2)
            return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return kernels.patchify(x, self.proj.weight, self.proj.bias, pos_embed)


class TimestepEmbedder(nn.Module):
    """Sinusoid of the original timestep (fp32), then Linear, SiLU, Linear: t (B,) -> (B, D)."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        first, last = nn.Linear(frequency_embedding_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    timestep_embedding = staticmethod(kernels.timestep_embedding)

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(kernels.timestep_embedding(t, self.frequency_embedding_size, out_dtype=dtype))


class LabelEmbedder(nn.Module):
    """Class table whose last row is the null class (index `num_classes`), used where a label is dropped for guidance.

    Labels are dropped in training with probability `dropout_prob`; `force_drop_ids` (B,), where 1 or True drops,
    replaces the draw. A table without dropout has no null row.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        if not 0 <= dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must be in [0, 1), got {dropout_prob}")
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        if self.dropout_prob == 0:
            raise ValueError("labels cannot be dropped: this model was built with class_dropout_prob=0, no null class")
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(f"labels must be (B,) integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        # Only where reading the values costs no device synchronization; loaders and samplers check theirs themselves.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, self.embedding_table.num_embeddings)
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


def check_labels(labels: Tensor, rows: int) -> None:
    """Raises ValueError if a label is no row of a class table with `rows` rows (the null class included)."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < rows:
        bad = labels[(labels < 0) | (labels >= rows)]
        raise ValueError(f"labels must be in 0..{rows - 1} for this model's class table, got {bad[:8].tolist()}")
