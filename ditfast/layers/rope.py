"""The angles of rotary position embeddings (arXiv:2104.09864) as tables, for `kernels.qk_norm_rope`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_1d(tokens: int, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head_dim / 2) in float32 of t * theta^(-2 i / head_dim), as in llama and LargeDiT.

    ValueError for an odd head_dim, or tokens that are no count.
    """
    if not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"tokens is {tokens!r}, expected how many there are")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number: channels are rotated in pairs")
    return _table(_angles(tokens, head_dim // 2, theta))


def rope_2d(grid: tuple[int, int], head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (rows * columns, head_dim / 2) in float32, tokens row-major, as in LightningDiT.

    The first half of the pairs turns by the token's row, the second by its column, each as `rope_1d` of half the width.
    ValueError for a head_dim that is no multiple of 4, or a grid that is not two counts.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}, expected a multiple of 4: half of its pairs is for each direction")
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(n, int) and n >= 0 for n in grid):
        raise ValueError(f"grid is {grid!r}, expected the numbers of rows and columns of tokens")
    height, width = grid
    row, column = (_angles(size, head_dim // 4, theta) for size in grid)
    both = row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1)
    return _table(torch.cat(both, -1).flatten(0, 1))


def _angles(positions: int, pairs: int, theta: float) -> Tensor:
    """(positions, pairs) in float64."""
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequency


def _table(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos().float(), angles.sin().float()
